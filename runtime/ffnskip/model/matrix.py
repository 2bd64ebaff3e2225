"""Weight matrices in the formats that the fast decode loop reads: float32, bfloat16, int8, int4.

Decoding at batch 1 reads every weight once per token, so half the bits are nearly half the time. A product computes
``x @ W.T`` with the very weights that `Matrix.unpack` returns. ``x`` is float32; beside int8 and int4 weights on a CPU
it is rounded where rows are read, to 16 bits with a scale per 256 numbers, and beside int4 that lies input by input to
14 bits with a scale per 32: both are finer than bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.model import int4
from ffnskip.model.int4 import GROUP

Format = Literal["float32", "bfloat16", "int8", "int4"]
PackedFormat = Literal["int8", "int4"]

AT_ONCE = 2**18  # numbers that are converted at a time: they stay in the cache, and no whole matrix is in float32


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight matrix ``[rows, columns]`` for products with vectors of ``columns`` numbers.

    Attributes:
        format: how the numbers are stored.
        data: ``[rows, columns]`` in float32, bfloat16 or int8; uint8 in int4, two numbers to a byte as
            `ffnskip.model.int4.join` has them.
        scale: in int8 ``[rows]`` float32; in int4 ``[rows, columns / 32, 2]`` float16, factor and offset of a group.
        bias: ``[rows]`` float32, or None.
        by_input: of int4, whether the numbers that share a byte are of two rows, and not of two columns.
    """

    format: Format
    data: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    by_input: bool = False

    @property
    def rows(self) -> int:
        """How many numbers a product gives."""
        return self.data.shape[0] * (2 if self.by_input else 1)

    @property
    def columns(self) -> int:
        """How many numbers the vectors have that it multiplies."""
        return self.data.shape[1] * (2 if self.format == "int4" and not self.by_input else 1)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads, without the bias."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def take(self, rows: Tensor) -> Matrix:
        """Copies of some rows, ``[n]`` integers."""
        taken = self.map(lambda tensor: tensor[rows.long()])
        return replace(taken, bias=None if self.bias is None else self.bias[rows.long()])

    def __getitem__(self, rows: slice) -> Matrix:
        """Some of the rows, sharing memory."""
        part = self.map(lambda tensor: tensor[rows])
        if self.by_input:
            part = replace(part, data=self.data[rows.start // 2 : rows.stop // 2])
        return replace(part, bias=None if self.bias is None else self.bias[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> Matrix:
        """A copy whose `data` and `scale` are `change` of these."""
        return replace(self, data=change(self.data), scale=None if self.scale is None else change(self.scale))

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weights that products use, ``[rows, columns]``, without the bias."""
        if self.scale is None:
            return self.data.to(dtype)
        weights = torch.empty(self.rows, self.columns, dtype=dtype, device=self.data.device)
        n = max(1, AT_ONCE // self.columns // int4.ROWS) * int4.ROWS
        chunks = weights.split(n), self.data.split(n // 2 if self.by_input else n), self.scale.split(n)
        for rows, data, scale in zip(*chunks, strict=True):
            wide = data.float().mul_(scale[:, None]) if self.format == "int8" else int4.wide(data, scale, self.by_input)
            rows.copy_(wide)
        return weights

    def turned(self, by_input: bool) -> Matrix:
        """The same numbers, with those of two rows or those of two columns sharing a byte, where any do.

        Raises:
            FfnskipError: rows of int4 are to share bytes, and are no multiple of 64.
        """
        if self.format != "int4" or by_input == self.by_input:
            return self
        if by_input and self.rows % int4.ROWS:
            raise FfnskipError(f"Rows of an int4 matrix share bytes in multiples of {int4.ROWS}, not {self.rows}.")
        return replace(self, data=int4.join(int4.split(self.data, self.by_input), by_input), by_input=by_input)


def plain(weight: Tensor, bias: Tensor | None = None) -> Matrix:
    """A matrix of the numbers as they are, sharing their memory.

    Raises:
        FfnskipError: they are neither float32 nor bfloat16.
    """
    name = str(weight.dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16"):
        raise FfnskipError(f"The fast decode loop reads float32 and bfloat16, not {name}.")
    return Matrix("float32" if name == "float32" else "bfloat16", weight.detach(), None, _float(bias))


def pack(weight: Tensor, format: PackedFormat, bias: Tensor | None = None, inputs: Tensor | None = None) -> Matrix:
    """Round a matrix to 8 bits with one scale per row, or to 4 bits with a factor and an offset per group of 32.

    Args:
        weight: ``[rows, columns]``.
        format: int8 or int4.
        bias: ``[rows]``, kept in float32.
        inputs: ``[columns]`` mean squares of what the columns are multiplied with; int4 keeps the product's squared
            error small for these. By default all are alike.

    Raises:
        FfnskipError: the format is unknown, or the columns of an int4 matrix are no multiple of 32.
    """
    if format not in get_args(PackedFormat):
        raise FfnskipError(f"Weights can be packed to int8 or int4, not {format!r}.")
    if format == "int4" and weight.shape[1] % GROUP:
        raise FfnskipError(f"int4 needs rows of a multiple of {GROUP} numbers, not {weight.shape[1]}: choose int8.")
    weight = weight.detach()
    importance = torch.ones(weight.shape[1], device=weight.device) if inputs is None else inputs.to(weight.device)
    chunks = weight.split(max(1, AT_ONCE // weight.shape[1]))
    parts = [to_int8(rows.float()) if format == "int8" else int4.narrow(rows.float(), importance) for rows in chunks]
    data, scale = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Matrix(format, data, scale, _float(bias))


def pack_shape(weight: Tensor, format: PackedFormat, bias: Tensor | None = None) -> Matrix:
    """What `pack` gives for a matrix on the device ``meta``, without numbers: types and shapes.

    Raises:
        FfnskipError: as `pack`.
    """
    row = pack(torch.zeros(1, weight.shape[1]), format)  # on meta each operation would take a hundred times as long
    return replace(row.map(lambda t: t.to("meta").expand(len(weight), *t.shape[1:])), bias=_float(bias))


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`Matrix.data` and `Matrix.scale` of some numbers ``[rows, columns]``."""
    scale = (rows.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (rows / scale[:, None]).round().to(torch.int8), scale


def stack(matrices: list[Matrix]) -> Matrix:
    """One matrix above the other, as one: where they lie so in memory already, without a copy.

    Raises:
        UnsupportedModelError: they are of different formats.
    """
    first, *others = matrices
    if odd := [other.format for other in others if other.format != first.format]:
        raise UnsupportedModelError(f"Matrices in {first.format} and {odd[0]} are not read as one, which GPUs need.")
    biases = [matrix.bias for matrix in matrices]
    bias = None
    if any(b is not None for b in biases):
        zeros = [torch.zeros(m.rows, device=m.data.device) for m in matrices]
        bias = torch.cat([zero if b is None else b for b, zero in zip(biases, zeros, strict=True)])
    scales = [matrix.scale for matrix in matrices if matrix.scale is not None]
    return replace(
        first, data=_joined([m.data for m in matrices]), scale=_joined(scales) if scales else None, bias=bias
    )


def _joined(parts: list[Tensor]) -> Tensor:
    end = parts[0].data_ptr()
    adjacent = True
    for part in parts:
        adjacent &= part.stride() == parts[0].stride() and part.data_ptr() == end
        adjacent &= part.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()
        end = part.data_ptr() + len(part) * part.stride(0) * part.element_size()
    if not adjacent:
        return torch.cat(parts)
    rows = sum(len(part) for part in parts)
    return parts[0].as_strided((rows, *parts[0].shape[1:]), parts[0].stride())


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float()
