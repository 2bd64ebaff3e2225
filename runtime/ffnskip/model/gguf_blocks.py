"""Matrices of GGUF files, and how they become packed ones.

A row is made of blocks, each with scales of its own. Types of 4 bits become int4: Q4_0 and Q4_1 bit for bit; in Q4_K,
whose factors and offsets are products of two numbers, these are rounded to float16. All others become int8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from numpy.typing import NDArray
from torch import Tensor

from ffnskip.model.int4 import GROUP
from ffnskip.model.matrix import AT_ONCE, Matrix, PackedFormat, to_int8
from ffnskip.pages import huge, settle

Bytes = NDArray[np.uint8]
_Packed = tuple[Bytes, NDArray[np.float16]]  # `Matrix.data` and `Matrix.scale` of int4
FLOATS = (Kind.F32, Kind.F16, Kind.BF16)


@dataclass(frozen=True)
class Stored:
    """A tensor as a file has it.

    Attributes:
        data: ``[rows, bytes of a row]``; a vector is one row.
        kind: how numbers lie in the bytes.
        shape: of the tensor, ``[rows, columns]`` or ``[columns]``.
        release: called when some of it has been read, to let go of the file's pages: beside what they became, they
            would be in memory twice.
    """

    data: Bytes
    kind: Kind
    shape: tuple[int, ...]
    release: Callable[[], None] = lambda: None

    def unpacked(self) -> Tensor:
        """The numbers, in float32; meant for what is small."""
        return torch.from_numpy(_numbers(self.data, self.kind)).view(self.shape)

    def at(self, row: Tensor, column: Tensor) -> Tensor:
        """Single numbers ``[n]`` in float32, of whose blocks alone are read."""
        block, nbytes = gguf.GGML_QUANT_SIZES[self.kind]
        blocks = self.data.reshape(len(self.data), -1, nbytes)[row.numpy(), column.numpy() // block]
        self.release()
        return torch.from_numpy(_numbers(blocks, self.kind)).gather(1, column[:, None] % block)[:, 0]

    def packed(self, bias: Tensor | None = None) -> Matrix:
        """The matrix in int4 or int8, made from some rows at a time; its ``bias [rows]`` is kept in float32."""
        rows, columns = self.shape
        to_int4 = _TO_INT4.get(self.kind)
        if to_int4 is None:
            format: PackedFormat = "int8"
            data, scale = _fresh((rows, columns), torch.int8), _fresh((rows,), torch.float32)
        else:
            format = "int4"
            data, scale = _fresh((rows, columns // 2), torch.uint8), _fresh((rows, columns // GROUP, 2), torch.float16)
        n = max(1, AT_ONCE // columns)
        for begin in range(0, rows, n):
            part = np.array(self.data[begin : begin + n])
            made = to_int4(part) if to_int4 else to_int8(torch.from_numpy(_numbers(part, self.kind)))
            data[begin : begin + n], scale[begin : begin + n] = map(torch.as_tensor, made)
            self.release()
        return Matrix(format, data, scale, None if bias is None else bias.float())


def _fresh(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that need not be moved for a decode step, if it is read alone."""
    memory = huge(int(np.prod(shape)) * dtype.itemsize)
    return settle(memory.view(dtype).view(shape).data)  # no view, or the memory would outlive its being moved


def _numbers(data: Bytes, kind: Kind) -> NDArray[np.float32]:
    numbers: NDArray[np.float32] = quants.dequantize(data.reshape(1, -1), kind)  # rows are unpacked in many turns
    return numbers.reshape(len(data), -1)


def _q4_0(rows: Bytes) -> _Packed:
    blocks = rows.reshape(len(rows), -1, 18)
    factor = blocks[..., :2].view(np.float16)
    return blocks[..., 2:].reshape(len(rows), -1), np.concatenate([factor, factor * np.float16(-8)], axis=-1)


def _q4_1(rows: Bytes) -> _Packed:
    blocks = rows.reshape(len(rows), -1, 20)
    return blocks[..., 4:].reshape(len(rows), -1), blocks[..., :4].view(np.float16)


def _q4_k(rows: Bytes) -> _Packed:
    """Of 32 bytes the low halves are a group, and the high halves the next one."""
    blocks = rows.reshape(len(rows), -1, 144)
    units: Any = blocks[..., :4].view(np.float16).astype(np.float32)
    factor, offset = quants.Q4_K.get_scale_min(blocks[..., 4:16].reshape(-1, 12))
    times = np.stack([factor, offset], axis=-1).reshape(*blocks.shape[:2], 8, 2) * np.array([1, -1], np.float32)
    scale = (units[..., None, :] * times).astype(np.float16)
    sixteens = np.ascontiguousarray(blocks[..., 16:]).view("V16").reshape(-1, 2)
    first, last = np.ascontiguousarray(sixteens.T).view(np.uint8)
    groups = np.stack([(first & 15 | last << 4).view("V16"), (first >> 4 | last & 0xF0).view("V16")], axis=-1)
    return groups.view(np.uint8).reshape(len(rows), -1), scale.reshape(len(rows), -1, 2)


_TO_INT4: dict[Kind, Callable[[Bytes], _Packed]] = {Kind.Q4_0: _q4_0, Kind.Q4_1: _q4_1, Kind.Q4_K: _q4_k}
