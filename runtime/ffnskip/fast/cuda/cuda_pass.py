"""One token per row through a model, on buffers that stay where they are: what a CUDA graph can record.

Nothing here waits for the device or depends on its numbers: who skips is decided in flags on the device, and kernels
that have nothing to do return at once. The residual stream and all that lies between two matrices is float32, whatever
the weights are: it costs little beside them, and keeps decisions from hanging on roundings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ffnskip.fast.cache import KeyValueCache
from ffnskip.fast.cuda import kernels, kernels_attention, kernels_stream
from ffnskip.fast.fused_model import FusedLayer, FusedModel
from ffnskip.fast.skipping import FusedCompensation, FusedSkip
from ffnskip.model.matrix import Matrix

INTERPRETED = kernels.INTERPRETED


class CudaPass:
    """The buffers of a step, and the launches that fill them.

    Attributes:
        tokens: ``[batch]`` int64, `counted` and `allowed` ``[batch]`` bool: what comes in.
        logits: ``[batch, vocabulary]`` float32: what comes out.
        position: ``[1]`` int64, the slot of the next token; one more after each pass.
        per_layer: ``[3, n_layers, batch]`` int64: rows skipped, checked and skipped first so far.
        never: ``[batch]`` int64, tokens without a skip so far.
    """

    def __init__(self, model: FusedModel, cache: KeyValueCache, skip: FusedSkip | None) -> None:
        self._model, self._cache, self._skip = model, cache, skip
        n_layers, batch = len(model.layers), cache.batch
        n_splits = kernels_attention.splits(cache.capacity)

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=model.device)

        self.tokens = buffer(batch, dtype=torch.int64)
        self.counted, self.allowed = (buffer(batch, dtype=torch.bool) for _ in range(2))
        self.logits = buffer(batch, model.vocabulary)
        self.position = buffer(1, dtype=torch.int64)
        self.per_layer = buffer(3, n_layers, batch, dtype=torch.int64)
        self.never = buffer(batch, dtype=torch.int64)
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
        rank = max((own.first.rows for own in self._compensations if own.first), default=0)
        neurons = max((len(own.neurons) for own in self._compensations if own.neurons is not None), default=0)
        self._z, self._b = buffer(batch, rank), buffer(batch, neurons)
        self._cos, self._sin = model.rotary_tables(cache.capacity)

    def run(self) -> None:
        """Take every row one token further."""
        model = self._model
        self._y.copy_(_embedded(model, self.tokens))
        self._h.zero_()
        self._remaining.zero_()
        kernels_stream.leave_ffn(self._h, self._y, None, model.layers[0].norm_attention, self._x, model.eps)
        for index, layer in enumerate(model.layers):
            self._run_attention(index, layer)
            self._run_ffn(index, layer)
        kernels.project(model.head, self._x, self.logits)
        if model.logit_cap is not None:
            self.logits.div_(model.logit_cap).tanh_().mul_(model.logit_cap)
        self._count()
        self.position.add_(1)

    def _run_attention(self, index: int, layer: FusedLayer) -> None:
        """From the normed stream in `_x` to the block's output in `_y`."""
        model, cache = self._model, self._cache
        keys, values = cache.keys[index], cache.values[index]
        kernels.project(self._qkv_matrices[index], self._x, self._qkv)
        kernels_attention.rotate(
            *(self._qkv, self._q, keys, values, self.position, cache.starts),
            *(self._cos[layer.rope], self._sin[layer.rope], layer.q_norm, layer.k_norm),
            *(model.eps, model.attention_scale),
        )
        kernels_attention.attend(
            *(self._q, keys, values, self.position, cache.starts),
            *(layer.window, model.attention_cap, self._partial, self._weight),
        )
        kernels_attention.merge(self._partial, self._weight, self._attended)
        kernels.project(layer.out, self._attended, self._y)

    def _run_ffn(self, index: int, layer: FusedLayer) -> None:
        """From attention's output in `_y` to the normed stream that the next layer, or the head, reads in `_x`."""
        model = self._model
        stream, gate_up = (self._h, self._y), self._gate_up_matrices[index]
        after = model.layers[index + 1].norm_attention if index + 1 < len(model.layers) else model.norm
        own = self._own(index)
        if own is None:
            kernels_stream.enter_ffn(*stream, layer.after_attention, layer.norm_ffn, self._x, model.eps)
            kernels.activate(gate_up, model.activation, self._x, self._a)
            kernels.contract(layer.down, self._a, self._y)
            kernels_stream.leave_ffn(*stream, layer.after_ffn, after, self._x, model.eps)
            return
        assert self._skip is not None
        skip, threshold = self._skipping[index], self._skip.threshold
        compares = self._skip.reads == "output" and index in self._checked
        z = self._x if own.first is None else self._z
        kernels_stream.enter_ffn(
            *(*stream, layer.after_attention, layer.norm_ffn, self._x, model.eps),
            *(skip, self.allowed, own.probe, own.probe_bias, threshold, self._remaining),
        )
        kernels.activate(gate_up, model.activation, self._x, self._a, skip, own, z, self._b)
        kernels.contract(layer.down, self._a, self._y, skip, own, z, self._b)
        kernels_stream.leave_ffn(
            *(*stream, layer.after_ffn, after, self._x, model.eps),
            *(skip, self.allowed, threshold, self._skip.reach, self._remaining if compares else None),
        )

    def _count(self) -> None:
        by_probe = self._skip is not None and self._skip.reads == "input"
        kernels_stream.count(
            self._skipping, self.counted, self.allowed, self.per_layer, self.never, self._checked, by_probe
        )

    @property
    def _compensations(self) -> list[FusedCompensation]:
        return [] if self._skip is None else list(self._skip.layers)

    def _own(self, index: int) -> FusedCompensation | None:
        """What the profile says of a layer; None outside the skip region."""
        if self._skip is None or not self._skip.cold_s <= index < self._skip.cold_e:
            return None
        return self._skip.layers[index - self._skip.cold_s]

    @property
    def _checked(self) -> range:
        """The layers in which rows are looked at: behind the region's last FFN nothing is left to skip."""
        return range(0) if self._skip is None else self._skip.looked_at


def _embedded(model: FusedModel, tokens: Tensor) -> Tensor:
    """``[batch, hidden]`` float32."""
    matrix = model.embedding
    scale = None if matrix.scale is None else matrix.scale[tokens]
    return Matrix(matrix.format, matrix.data[tokens], scale).unpack(torch.float32) * model.embedding_scale
