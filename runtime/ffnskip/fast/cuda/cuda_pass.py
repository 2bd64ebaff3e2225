"""One token per row through a model, on buffers that stay where they are: what a CUDA graph can record.

Nothing here waits for the device or depends on its numbers: who skips is decided in flags on the device, and kernels
that have nothing to do return at once. The residual stream and all that lies between two matrices is float32, whatever
the weights are: it costs little beside them, and keeps decisions from hanging on roundings.

Experimental: see `cuda_step`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ffnskip.fast.cache import KeyValueCache
from ffnskip.fast.cuda import kernels, kernels_attention, kernels_stream
from ffnskip.fast.fused_model import FusedLayer, FusedModel
from ffnskip.fast.skipping import FusedSkip
from ffnskip.model.matrix import Matrix
from ffnskip.stats import SkipStats

INTERPRETED = kernels.INTERPRETED


class CudaPass:
    """The buffers of a step, and the launches that fill them.

    Attributes:
        tokens: ``[batch]`` int64, `ended`, `counted` and `allowed` ``[batch]`` bool: what comes in.
        logits: ``[batch, vocabulary]`` float32: what comes out.
        position: ``[1]`` int64, the slot of the next token; one more after each pass.
        per_layer: ``[3, n_layers, batch]`` int64: rows skipped, checked and skipped first so far.
        never: ``[batch]`` int64, tokens without a skip so far.
        state: what a pass goes on from.
    """

    def __init__(self, model: FusedModel, cache: KeyValueCache, skip: FusedSkip | None) -> None:
        self._model, self._cache, self._skip = model, cache, skip
        n_layers, batch = len(model.layers), cache.batch
        n_splits = kernels_attention.splits(cache.capacity)

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=model.device)

        self.tokens = buffer(batch, dtype=torch.int64)
        self.ended, self.counted, self.allowed = (buffer(batch, dtype=torch.bool) for _ in range(3))
        self.logits = buffer(batch, model.vocabulary)
        self.position = buffer(1, dtype=torch.int64)
        self.per_layer = buffer(3, n_layers, batch, dtype=torch.int64)
        self.never = buffer(batch, dtype=torch.int64)
        self.state = [self.position, self.per_layer, self.never]
        self._h, self._x, self._y = (buffer(batch, model.hidden) for _ in range(3))
        # Stacked now: what is not side by side is copied once, and not with every token.
        self._qkv_matrices = [layer.qkv for layer in model.layers]
        self._gate_up_matrices = [layer.gate_up for layer in model.layers]
        self._qkv = buffer(batch, self._qkv_matrices[0].rows)
        self._q = buffer(batch, model.heads, model.head_dim)
        self._attended = buffer(batch, model.heads * model.head_dim)
        self._partial = buffer(batch, model.heads, n_splits, model.head_dim)
        self._weight = buffer(2, batch, model.heads, n_splits)
        self._a = buffer(batch, model.intermediate)
        self._skipping = buffer(n_layers, batch, dtype=torch.int32)
        self._remaining = buffer(batch, dtype=torch.int32)
        compensations = [] if skip is None else skip.layers
        rank = max((c.first.rows for c in compensations if c.first), default=0)
        neurons = max((len(c.neurons) for c in compensations if c.neurons is not None), default=0)
        self._z, self._neurons_a = buffer(batch, rank), buffer(batch, neurons)
        self._cos, self._sin = model.rotary_tables(cache.capacity)

    def launch(self) -> None:
        """Launch the kernels that take every row one token further."""
        model = self._model
        self._y.copy_(_embedded(model, self.tokens))
        self._h.zero_()
        self._remaining.zero_()
        first_norm = model.layers[0].norm_attention
        assert first_norm is not None  # `CudaStep` has refused the others
        kernels_stream.leave_ffn(self._h, self._y, self._x, after=None, norm=first_norm, eps=model.eps)
        for index, layer in enumerate(model.layers):
            self._launch_attention(index, layer)
            self._launch_ffn(index, layer)
        kernels.project(model.head, self._x, self.logits)
        if model.logit_cap is not None:
            self.logits.div_(model.logit_cap).tanh_().mul_(model.logit_cap)
        self._count()
        self.position.add_(1)

    def drain(self, stats: SkipStats) -> None:
        """Move what was counted to `stats`; waits for the device."""
        stats.add_counts(self.per_layer.sum(dim=2).tolist(), int(self.never.sum()))
        self.per_layer.zero_()
        self.never.zero_()

    def _launch_attention(self, index: int, layer: FusedLayer) -> None:
        """From the normed stream in `_x` to the block's output in `_y`."""
        model = self._model
        cache = kernels_attention.LayerCache(
            self._cache.keys[index], self._cache.values[index], self.position, self._cache.starts
        )
        self._project(index, "attention_input", self._qkv_matrices[index], self._x, self._qkv)
        kernels_attention.rotate(
            self._qkv,
            self._q,
            cache,
            cos=self._cos[layer.rope],
            sin=self._sin[layer.rope],
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=model.eps,
            scale=model.attention_scale,
        )
        kernels_attention.attend(
            self._q, cache, self._partial, self._weight, window=layer.window, cap=model.attention_cap
        )
        kernels_attention.merge(self._partial, self._weight, self._attended)
        self._project(index, "attention_output", layer.out, self._attended, self._y)

    def _project(self, index: int, role: str, matrix: Matrix, x: Tensor, y: Tensor) -> None:
        """``y = matrix x`` in attention, for inputs of a role (`ffnskip.model.parts`) in a layer."""
        kernels.project(matrix, x, y)

    def _launch_ffn(self, index: int, layer: FusedLayer) -> None:
        """From attention's output in `_y` to the normed stream that the next layer, or the head, reads in `_x`."""
        model, skip = self._model, self._skip
        entering, leaving = self._norms(index, layer)
        skipping = None
        if skip is not None and skip.cold_s <= index < skip.cold_e:
            compensation, rows = skip.layers[index - skip.cold_s], self._skipping[index]
            z = self._x if compensation.first is None else self._z
            skipping = kernels.Skipping(rows, compensation, z, self._neurons_a)
            deciding = {"skip": rows, "allowed": self.allowed, "threshold": skip.threshold}
            probe = {"probe": compensation.probe, "probe_bias": compensation.probe_bias}
            entering |= {**deciding, **probe, "remaining": self._remaining}
            compares = skip.reads == "output" and index in skip.looked_at
            leaving |= {**deciding, "reach": skip.reach, "remaining": self._remaining if compares else None}
        kernels_stream.enter_ffn(self._h, self._y, self._x, **entering)
        kernels.activate(self._gate_up_matrices[index], model.activation, self._x, self._a, skipping)
        kernels.contract(layer.down, self._a, self._y, skipping)
        kernels_stream.leave_ffn(self._h, self._y, self._x, **leaving)

    def _norms(self, index: int, layer: FusedLayer) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `enter_ffn` and `leave_ffn` need to know of a layer's norms and those of the next."""
        model = self._model
        following = model.layers[index + 1].norm_attention if index + 1 < len(model.layers) else model.norm
        return (
            {"after": layer.after_attention, "norm": layer.norm_ffn, "eps": model.eps},
            {"after": layer.after_ffn, "norm": following, "eps": model.eps},
        )

    def _count(self) -> None:
        skip = self._skip
        kernels_stream.count(
            self._skipping,
            self.counted,
            self.allowed,
            self.per_layer,
            self.never,
            checked=range(0) if skip is None else skip.looked_at,
            by_probe=skip is not None and skip.reads == "input",
        )


def _embedded(model: FusedModel, tokens: Tensor) -> Tensor:
    """``[batch, hidden]`` float32."""
    matrix = model.embedding
    scale = None if matrix.scale is None else matrix.scale[tokens]
    return Matrix(matrix.format, matrix.data[tokens], scale).unpack(torch.float32) * model.embedding_scale
