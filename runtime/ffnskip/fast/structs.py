# ruff: noqa: D101
"""The structs of cpp/structs.h and cpp/format.h as ctypes, field by field, and the functions of the library."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p

from ffnskip.errors import UnsupportedModelError
from ffnskip.fast.codes import FORMATS
from ffnskip.fast.layout import input_stretch
from ffnskip.model import matrix as weights


class Matrix(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("data", "scale", "bias")),
        ("rows", c_int64),
        ("columns", c_int64),
        ("stretch", c_int64),
        ("format", c_int32),
    )


def pointers(matrix: weights.Matrix) -> Matrix:
    """Where a matrix lies; good as long as its tensors live and stay there."""
    stretch = input_stretch(matrix.data) * (2 if matrix.by_input else 1)
    assert stretch or (matrix.data.is_contiguous() and not matrix.by_input)
    data, scale, bias = (None if t is None else t.data_ptr() for t in (matrix.data, matrix.scale, matrix.bias))
    return Matrix(data, scale, bias, matrix.rows, matrix.columns, stretch, FORMATS[matrix.format])


class Layer(Structure):
    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "out", "gate", "up", "down")),
        *((name, c_void_p) for name in ("norm_attention", "norm_ffn", "after_attention", "after_ffn")),
        *((name, c_void_p) for name in ("q_norm", "k_norm")),
        ("window", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
    )


class Compensation(Structure):
    _fields_ = (
        ("probe", c_void_p),
        ("probe_bias", c_float),
        *((name, Matrix) for name in ("first", "gate", "up", "last")),
        ("bias", c_void_p),
    )


class Parts(Structure):
    _fields_ = (("limits", c_void_p * 4),)


_SIZES = ("n_layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "rotary")

_FACTORS = (
    *("eps", "attention_scale", "attention_cap", "logit_cap"),
    *("embedding_scale", "residual_scale", "logit_scale"),
)


class Model(Structure):
    _fields_ = (
        *((name, c_int64) for name in _SIZES),
        *((name, c_float) for name in _FACTORS),
        ("norm_across_heads", c_int32),
        ("activation", c_int32),
        ("layers", c_void_p),
        ("embedding", Matrix),
        ("head", Matrix),
        ("norm", c_void_p),
        ("rule", c_int32),
        ("threshold", c_float),
        *((name, c_int64) for name in ("reach", "cold_s", "cold_e")),
        ("compensations", c_void_p),
        ("parts", c_void_p),
        ("shares", c_double * 4),
    )


class Cache(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values", "starts")),
        ("batch", c_int64),
        ("capacity", c_int64),
        ("format", c_int32),
    )


class Counts(Structure):
    _fields_ = tuple(
        (name, c_void_p) for name in ("skipped", "checked", "first_skipped", "never_skipped", "left_out", "least")
    )


class Input(Structure):
    _fields_ = (
        ("tokens", c_void_p),
        ("slot", c_int64),
        *((name, c_void_p) for name in ("ended", "counted", "allowed", "logits")),
    )


class Chunk(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("tokens", "rows", "slots")),
        ("n", c_int64),
        ("last", c_int64),
        ("logits", c_void_p),
    )


MIRRORS = (Matrix, Layer, Compensation, Model, Cache, Counts, Input, Parts, Chunk)


def declare(library: ctypes.CDLL, mirrors: Iterable[type[Structure]] = MIRRORS) -> ctypes.CDLL:
    """Tell ctypes the library's functions, after comparing the sizes of the structs that they take.

    Raises:
        UnsupportedModelError: a struct of the library has another size than its mirror here.
    """
    library.ffnskip_sizeof.argtypes = [c_char_p]
    library.ffnskip_sizeof.restype = c_int64
    for mirror in mirrors:
        compiled = library.ffnskip_sizeof(mirror.__name__.encode())
        if compiled != ctypes.sizeof(mirror):
            raise UnsupportedModelError(
                f"The compiled decode step's struct {mirror.__name__} has {compiled} bytes, where ffnskip expects "
                f"{ctypes.sizeof(mirror)}: the two do not belong together."
            )
    library.ffnskip_open.argtypes = [c_void_p, c_void_p, c_void_p, c_int32]
    library.ffnskip_open.restype = c_void_p
    library.ffnskip_close.argtypes = [c_void_p]
    library.ffnskip_seconds.argtypes = [c_void_p]
    library.ffnskip_seconds.restype = POINTER(c_double)
    library.ffnskip_step.argtypes = [c_void_p, c_void_p]
    library.ffnskip_step.restype = None
    library.ffnskip_read.argtypes = [c_void_p, c_void_p]
    library.ffnskip_read.restype = c_int32
    library.ffnskip_multiply.argtypes = [c_void_p, c_int64, c_void_p, c_void_p, c_int32, c_int32]
    library.ffnskip_multiply.restype = None
    return library
