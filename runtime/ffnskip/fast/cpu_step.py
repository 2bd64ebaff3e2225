"""The decode step on a CPU: one call into compiled code per token (``cpp/step.cpp``), no Python in between."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p
from typing import get_args

import torch
from torch import Tensor

from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.fast.build import native_library
from ffnskip.fast.cache import KeyValueCache
from ffnskip.fast.fused_model import Activation, FusedLayer, FusedModel
from ffnskip.fast.layout import together
from ffnskip.fast.skipping import FusedCompensation, FusedSkip
from ffnskip.fast.step import MAX_BATCH, Counts
from ffnskip.model.matrix import Format, Matrix, plain

PARTS = ("attention", "ffn", "compensation", "rule", "head")


class NativeStep:
    """A step of a model on the CPU, see `ffnskip.fast.step.Step`.

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
        self._library = _declared(native_library())
        self._kept: list[object] = []  # what the structs point at
        self._logits = torch.empty(cache.batch, model.vocabulary, dtype=torch.float32, device="cpu")
        self._counters = torch.zeros(3, len(model.layers), dtype=torch.int64, device="cpu")
        self._never_skipped = torch.zeros(1, dtype=torch.int64, device="cpu")
        counts = _Counts(*(_pointer(counter) for counter in self._counters), _pointer(self._never_skipped))
        arguments = (self._model(model, skip), self._cache(), counts)
        self._kept += arguments
        self._engine = self._library.ffnskip_open(*map(ctypes.byref, arguments), torch.get_num_threads())

    def __call__(self, tokens: Tensor, ended: Tensor, counted: Tensor, allowed: Tensor) -> Tensor:
        """See `Step`."""
        if self.cache.length >= self.cache.capacity:
            raise FfnskipError(f"The key-value cache is full: it holds {self.cache.capacity} tokens.")
        given = [tokens.long().contiguous(), *(flags.bool().contiguous() for flags in (ended, counted, allowed))]
        if any(tensor.shape != (self.cache.batch,) for tensor in given):
            raise FfnskipError(f"The decode step is for {self.cache.batch} sequences at once.")
        where = _Input(_pointer(given[0]), self.cache.length, *map(_pointer, given[1:]), _pointer(self._logits))
        self._library.ffnskip_step(self._engine, ctypes.byref(where))
        self.cache.length += 1
        return self._logits

    def counts(self) -> Counts:
        """See `Step`."""
        skipped, checked, first_skipped = self._counters.tolist()
        return Counts(skipped, checked, first_skipped, int(self._never_skipped))

    def reset_counts(self) -> None:
        """See `Step`."""
        self._counters.zero_()
        self._never_skipped.zero_()

    def seconds(self) -> dict[str, float]:
        """Time that this step has spent so far in each of `PARTS`."""
        return dict(zip(PARTS, self._library.ffnskip_seconds(self._engine)[: len(PARTS)], strict=True))

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._library.ffnskip_close(self._engine)

    def _model(self, model: FusedModel, skip: FusedSkip | None) -> _Model:
        cos, sin = model.rotary_tables(self.cache.capacity)
        self._kept += [cos, sin]
        layers = (_Layer * len(model.layers))(*(self._layer(layer, cos, sin) for layer in model.layers))
        compensations = self._compensations(model, skip) if skip else []
        self._kept += [layers, instead := (_Compensation * len(compensations))(*compensations)]
        return _Model(
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
            activation=get_args(Activation).index(model.activation),
            layers=ctypes.cast(layers, c_void_p),
            embedding=self._matrix(model.embedding),
            head=self._matrix(model.head),
            norm=self._vector(model.norm),
            rule=skip.code if skip else 0,
            threshold=skip.threshold if skip else 0.0,
            reach=skip.reach if skip else 0,
            cold_s=skip.cold_s if skip else 0,
            cold_e=skip.cold_e if skip else 0,
            compensations=ctypes.cast(instead, c_void_p),
        )

    def _layer(self, layer: FusedLayer, cos: Tensor, sin: Tensor) -> _Layer:
        return _Layer(
            *map(self._matrix, (layer.q, layer.k, layer.v, layer.out, layer.gate, layer.up, layer.down)),
            *map(self._vector, (layer.norm_attention, layer.norm_ffn, layer.after_attention, layer.after_ffn)),
            *map(self._vector, (layer.q_norm, layer.k_norm)),
            layer.window or 0,
            _pointer(cos[layer.rope]),
            _pointer(sin[layer.rope]),
        )

    def _compensations(self, model: FusedModel, skip: FusedSkip) -> list[_Compensation]:
        region = model.layers[skip.cold_s : skip.cold_e]
        factors = [_factors(own, layer) for own, layer in zip(skip.layers, region, strict=True)]
        placed = iter(together([matrix for layer in factors for matrix in layer]))
        return [
            _Compensation(
                self._vector(own.probe),
                own.probe_bias,
                *(self._matrix(next(placed)) for _ in layer),
                self._vector(own.bias),
            )
            for own, layer in zip(skip.layers, factors, strict=True)
        ]

    def _matrix(self, matrix: Matrix | None) -> _Matrix:
        if matrix is None:
            return _Matrix()
        data, scale = self._vector(matrix.data), self._vector(matrix.scale)
        format = get_args(Format).index(matrix.format)
        return _Matrix(data, scale, self._vector(matrix.bias), matrix.rows, matrix.columns, format)

    def _vector(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor := tensor.contiguous())
        return _pointer(tensor)

    def _cache(self) -> _Cache:
        cache = self.cache
        format = get_args(Format).index(str(cache.keys.dtype).removeprefix("torch."))
        tensors = map(_pointer, (cache.keys, cache.values, cache.starts))
        return _Cache(*tensors, cache.batch, cache.capacity, format)


def _factors(
    own: FusedCompensation, layer: FusedLayer
) -> tuple[Matrix | None, Matrix | None, Matrix | None, Matrix | None]:
    """What a skip reads, in that order: first factor, gate and up rows of the neurons, and the rest side by side.

    The neurons' rows are copied, so that they are read in one stretch.
    """
    gate = up = last = None
    if own.neurons is not None:
        gate, up = layer.gate.take(own.neurons), layer.up.take(own.neurons)
    parts = [matrix.data for matrix in (own.second, own.down) if matrix is not None]
    if parts:
        last = plain(torch.cat(parts, dim=1), own.bias)
    return own.first, gate, up, last


def _pointer(tensor: Tensor) -> int:
    return tensor.data_ptr()


# These mirror the structs of the same names in cpp/*.h and cpp/step.cpp, field by field.


class _Matrix(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("data", "scale", "bias")),
        ("rows", c_int64),
        ("columns", c_int64),
        ("format", c_int32),
    )


class _Layer(Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("q", "k", "v", "out", "gate", "up", "down")),
        *((name, c_void_p) for name in ("norm_attention", "norm_ffn", "after_attention", "after_ffn")),
        *((name, c_void_p) for name in ("q_norm", "k_norm")),
        ("window", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
    )


class _Compensation(Structure):
    _fields_ = (
        ("probe", c_void_p),
        ("probe_bias", c_float),
        *((name, _Matrix) for name in ("first", "gate", "up", "last")),
        ("bias", c_void_p),
    )


class _Model(Structure):
    _fields_ = (
        *(
            (name, c_int64)
            for name in ("n_layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "rotary")
        ),
        *((name, c_float) for name in ("eps", "attention_scale", "attention_cap", "logit_cap", "embedding_scale")),
        ("activation", c_int32),
        ("layers", c_void_p),
        ("embedding", _Matrix),
        ("head", _Matrix),
        ("norm", c_void_p),
        ("rule", c_int32),
        ("threshold", c_float),
        *((name, c_int64) for name in ("reach", "cold_s", "cold_e")),
        ("compensations", c_void_p),
    )


class _Cache(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values", "starts")),
        ("batch", c_int64),
        ("capacity", c_int64),
        ("format", c_int32),
    )


class _Counts(Structure):
    _fields_ = tuple((name, c_void_p) for name in ("skipped", "checked", "first_skipped", "never_skipped"))


class _Input(Structure):
    _fields_ = (
        ("tokens", c_void_p),
        ("slot", c_int64),
        ("ended", c_void_p),
        ("counted", c_void_p),
        ("allowed", c_void_p),
        ("logits", c_void_p),
    )


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.ffnskip_open.argtypes = [c_void_p, c_void_p, c_void_p, c_int32]
    library.ffnskip_open.restype = c_void_p
    library.ffnskip_close.argtypes = [c_void_p]
    library.ffnskip_seconds.argtypes = [c_void_p]
    library.ffnskip_seconds.restype = POINTER(c_double)
    library.ffnskip_step.argtypes = [c_void_p, c_void_p]
    library.ffnskip_step.restype = None
    return library
