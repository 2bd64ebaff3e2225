"""The decode step on a CPU: one call into compiled code per token (``cpp/step.cpp``), no Python in between."""

from __future__ import annotations

import ctypes
from ctypes import c_void_p

import torch
from torch import Tensor

from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.fast import structs
from ffnskip.fast.build import step_library
from ffnskip.fast.cache import KeyValueCache
from ffnskip.fast.codes import ACTIVATIONS, FORMATS, RULES
from ffnskip.fast.fused_model import FusedLayer, FusedModel
from ffnskip.fast.layout import together
from ffnskip.fast.parts import PartCounts
from ffnskip.fast.skipping import FusedCompensation, FusedSkip
from ffnskip.fast.step import MAX_BATCH
from ffnskip.model.matrix import Matrix, plain
from ffnskip.model.parts import ROLES
from ffnskip.stats import SkipStats

_CHUNK = 256  # tokens of prompts that are read at a time; between chunks the program can be interrupted
PARTS = ("attention", "ffn", "compensation", "rule", "head")


class CpuStep:
    """A fused step on the CPU, see `ffnskip.fast.step.FusedStep`.

    Args:
        model: the model.
        cache: of at most `MAX_BATCH` sequences.
        skip: the profile; None runs dense.

    Raises:
        UnsupportedModelError: the model is not on the CPU, or there is no compiler.
        FfnskipError: the batch is too large.
    """

    def __init__(self, model: FusedModel, cache: KeyValueCache, skip: FusedSkip | None) -> None:
        if model.device.type != "cpu":
            raise UnsupportedModelError("The native decode step runs on the CPU.")
        if cache.batch > MAX_BATCH:
            raise FfnskipError(f"The native decode step takes at most {MAX_BATCH} sequences at once.")
        self.cache = cache
        self._leaves_out_parts = skip is not None and bool(skip.limits)
        self._library = step_library()
        self._referenced: list[object] = []  # what the structs point at must live as long as they do
        self._logits = torch.empty(cache.batch, model.vocabulary, dtype=torch.float32, device="cpu")
        self._counters = torch.zeros(3, len(model.layers), dtype=torch.int64, device="cpu")
        self._never_skipped = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._parts = PartCounts(model)
        counters = (*self._counters, self._never_skipped, self._parts.left_out, self._parts.least)
        counts = structs.Counts(*map(_pointer, counters))
        arguments = (self._model(model, skip), self._cache(), counts)
        self._referenced += arguments
        self._handle = self._library.ffnskip_open(*map(ctypes.byref, arguments), torch.get_num_threads())

    def __call__(self, tokens: Tensor, ended: Tensor, counted: Tensor, allowed: Tensor) -> Tensor:
        """See `FusedStep`."""
        if self.cache.length >= self.cache.capacity:
            raise FfnskipError(f"The key-value cache is full: it holds {self.cache.capacity} tokens.")
        tokens, flags = tokens.long().contiguous(), [t.bool().contiguous() for t in (ended, counted, allowed)]
        if any(tensor.shape != (self.cache.batch,) for tensor in (tokens, *flags)):
            raise FfnskipError(f"The decode step is for {self.cache.batch} sequences at once.")
        self._check_tokens(tokens)
        step_input = structs.Input(_pointer(tokens), self.cache.length, *map(_pointer, (*flags, self._logits)))
        self._library.ffnskip_step(self._handle, ctypes.byref(step_input))
        self.cache.length += 1
        return self._logits

    def read(self, prompts: Tensor, starts: Tensor) -> Tensor:
        """See `FusedStep`."""
        batch, length = prompts.shape
        if batch != self.cache.batch or length > self.cache.capacity:
            raise FfnskipError(f"The cache is for {self.cache.batch} prompts of at most {self.cache.capacity} tokens.")
        self.cache.starts.copy_(starts)
        rows, slots = (torch.arange(length) >= starts[:, None]).nonzero(as_tuple=True)
        tokens = prompts.long()[rows, slots]
        self._check_tokens(tokens)
        for some in zip(*(t.tensor_split(-(-len(tokens) // _CHUNK)) for t in (tokens, rows, slots)), strict=True):
            chunk = structs.Chunk(*map(_pointer, some), len(some[0]), length - 1, _pointer(self._logits))
            if not self._library.ffnskip_read(self._handle, ctypes.byref(chunk)):
                raise MemoryError(f"There is no room to read a prompt of {length} tokens.")
        self.cache.length = length
        return self._logits

    def _check_tokens(self, tokens: Tensor) -> None:
        if not all(0 <= token < self._logits.shape[1] for token in tokens.tolist()):
            raise FfnskipError(f"Tokens must be among the model's {self._logits.shape[1]}.")

    def drain_counts(self, stats: SkipStats) -> None:
        """See `FusedStep`."""
        stats.add_counts(self._counters.tolist(), int(self._never_skipped))
        self._counters.zero_()
        self._never_skipped.zero_()
        if self._leaves_out_parts:
            self._parts.drain(stats)

    def seconds(self) -> dict[str, float]:
        """Time that this step has spent so far in each of `PARTS`."""
        return dict(zip(PARTS, self._library.ffnskip_seconds(self._handle)[: len(PARTS)], strict=True))

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._library.ffnskip_close(self._handle)

    def _model(self, model: FusedModel, skip: FusedSkip | None) -> structs.Model:
        cos, sin = model.rotary_tables(self.cache.capacity)
        self._referenced += [cos, sin]
        layers = (structs.Layer * len(model.layers))(*(self._layer(layer, cos, sin) for layer in model.layers))
        compensations = self._compensations(model, skip) if skip and skip.layers else []
        array = (structs.Compensation * len(compensations))(*compensations)
        parts = self._limits(skip)
        self._referenced += [layers, array, parts]
        return structs.Model(
            n_layers=len(model.layers),
            hidden=model.hidden,
            intermediate=model.intermediate,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            rotary=cos.shape[2],
            eps=model.eps,
            attention_scale=model.attention_scale,
            attention_cap=model.attention_cap or 0.0,
            logit_cap=model.logit_cap or 0.0,
            embedding_scale=model.embedding_scale,
            residual_scale=model.residual_scale,
            logit_scale=model.logit_scale,
            norm_across_heads=model.norm_across_heads,
            activation=ACTIVATIONS[model.activation],
            layers=ctypes.cast(layers, c_void_p),
            embedding=self._matrix(model.embedding),
            head=self._matrix(model.head),
            norm=self._vector(model.norm),
            rule=RULES[skip.rule] if skip else 0,
            threshold=skip.threshold if skip else 0.0,
            reach=skip.reach if skip else 0,
            cold_s=skip.cold_s if skip else 0,
            cold_e=skip.cold_e if skip else 0,
            compensations=ctypes.cast(array, c_void_p),
            parts=ctypes.cast(parts, c_void_p),
            shares=(ctypes.c_double * len(ROLES))(*self._parts.shares),
        )

    def _layer(self, layer: FusedLayer, cos: Tensor, sin: Tensor) -> structs.Layer:
        return structs.Layer(
            *map(self._matrix, (layer.q, layer.k, layer.v, layer.out, layer.gate, layer.up, layer.down)),
            *map(self._vector, (layer.norm_attention, layer.norm_ffn, layer.after_attention, layer.after_ffn)),
            *map(self._vector, (layer.q_norm, layer.k_norm)),
            layer.window or 0,
            _pointer(cos[layer.rope]),
            _pointer(sin[layer.rope]),
        )

    def _compensations(self, model: FusedModel, skip: FusedSkip) -> list[structs.Compensation]:
        region = model.layers[skip.cold_s : skip.cold_e]
        factors = [_factors(compensation, layer) for compensation, layer in zip(skip.layers, region, strict=True)]
        matrices = iter(together([matrix for layer in factors for matrix in layer]))
        return [
            structs.Compensation(
                self._vector(compensation.probe),
                compensation.probe_bias,
                *(self._matrix(next(matrices)) for _ in layer),
                self._vector(compensation.bias),
            )
            for compensation, layer in zip(skip.layers, factors, strict=True)
        ]

    def _limits(self, skip: FusedSkip | None) -> ctypes.Array[structs.Parts]:
        layers = skip.limits if skip else ()
        pointers = [(c_void_p * len(ROLES))(*map(self._vector, layer)) for layer in layers]
        return (structs.Parts * len(layers))(*(structs.Parts(array) for array in pointers))

    def _matrix(self, matrix: Matrix | None) -> structs.Matrix:
        if matrix is None:
            return structs.Matrix()
        self._referenced.append(matrix)
        return structs.pointers(matrix)

    def _vector(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._referenced.append(tensor := tensor.contiguous())
        return _pointer(tensor)

    def _cache(self) -> structs.Cache:
        cache = self.cache
        format = FORMATS[str(cache.keys.dtype).removeprefix("torch.")]
        tensors = map(_pointer, (cache.keys, cache.values, cache.starts))
        return structs.Cache(*tensors, cache.batch, cache.capacity, format)


def _factors(
    compensation: FusedCompensation, layer: FusedLayer
) -> tuple[Matrix | None, Matrix | None, Matrix | None, Matrix | None]:
    """What a skip reads, in that order: first factor, gate and up rows of the neurons, and the rest side by side.

    The neurons' rows are copied, so that they are read in one stretch.
    """
    gate = up = last = None
    if compensation.neurons is not None:
        gate, up = layer.gate.take(compensation.neurons), layer.up.take(compensation.neurons)
    parts = [matrix.data for matrix in (compensation.second, compensation.down) if matrix is not None]
    if parts:
        last = plain(torch.cat(parts, dim=1), compensation.bias)
    return compensation.first, gate, up, last


def _pointer(tensor: Tensor) -> int:
    return tensor.data_ptr()
