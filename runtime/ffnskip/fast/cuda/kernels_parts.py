# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803
"""Triton kernels of the rule `price`: inputs that are left out, and products with matrices that lie input by input.

An input that is left out becomes zero. A product does not read the stretch of an input that is zero in every row: each
program looks at its share of the inputs itself, so no list of them is made first. Programs share out the outputs and,
as these are too few, the inputs; what they add up is added up in a second launch, in an order that is always the same.

Experimental: see `cuda_step`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ffnskip.fast.cuda.kernels import activated, add_product, store
from ffnskip.fast.fused_model import Activation
from ffnskip.fast.layout import input_stretch
from ffnskip.fast.step import MAX_BATCH
from ffnskip.model.matrix import Matrix

_LINE = 128  # bytes of a stretch that a program reads, what memory hands out at once
_PROGRAMS = 512  # several for each of a GPU's processors


def thin(x: Tensor, limit: Tensor, allowed: Tensor, ended: Tensor, left_out: Tensor) -> None:
    """Leave out the inputs that are not worth it, and count them.

    Args:
        x: ``[batch, width]`` float32; what is left out becomes zero.
        limit: ``[width]`` float32, the magnitudes under which inputs are left out. What is not a number is kept.
        allowed: ``[batch]`` bool, the rows in which any is left out.
        ended: ``[batch]`` bool, rows that become zero as a whole: no matrix is read for their sake.
        left_out: ``[batch]`` int64, written: how many were left out of each row.
    """
    batch, width = x.shape
    options = {"WIDTH": triton.next_power_of_2(width), "num_warps": 8}
    _thin_kernel[(batch,)](x, limit, allowed, ended, left_out, width, **options)


def project(matrix: Matrix, x: Tensor, y: Tensor, activation: Activation | None = None) -> None:
    """``y = matrix x``; with an activation ``y = act(gate x) * (up x)``, where the matrix is gate above up.

    Args:
        matrix: ``[rows, columns]``, a transposed view (`ffnskip.fast.layout`); not in int4.
        x: ``[batch, columns]`` float32.
        y: ``[batch, rows]`` float32, or with an activation ``[batch, rows / 2]``; written.
        activation: that of the gate.
    """
    rows, columns, batch = matrix.rows, matrix.columns, len(x)
    outputs, inputs = _LINE // matrix.data.element_size(), 128 if batch == 1 else 32
    blocks = triton.cdiv(rows, outputs)
    span = triton.cdiv(columns, triton.cdiv(_PROGRAMS, blocks) * inputs) * inputs
    splits = triton.cdiv(columns, span)
    sums = x.new_empty(splits, batch, rows)
    _add_up_kernel[(blocks, splits)](
        matrix.data, input_stretch(matrix.data), x, sums, rows, columns, span, batch,
        BATCH=1 if batch == 1 else MAX_BATCH, OUTPUTS=outputs, INPUTS=inputs, STAGES=3,
    )  # fmt: skip
    _collect_kernel[(triton.cdiv(y.shape[1], 256), batch)](
        sums, matrix.scale, matrix.bias, y, rows, y.shape[1], splits, ACTIVATION=activation, BLOCK=256
    )


@triton.jit
def _thin_kernel(x, limit, allowed, ended, left_out, width, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < width
    cell = x + row * width + column
    value = tl.load(cell, mask=inside, other=0.0)
    least = tl.where(tl.load(allowed + row) != 0, tl.load(limit + column, mask=inside, other=0.0), 0.0)
    leave_out = tl.abs(value) < least
    tl.store(left_out + row, tl.sum(leave_out.to(tl.int64), axis=0))
    kept = tl.where(leave_out, 0.0, value)
    tl.store(cell, tl.where(tl.load(ended + row) != 0, 0.0, kept), mask=inside)


@triton.jit
def _add_up_kernel(
    data, stretch, x, sums, outputs, inputs, span, batch,
    BATCH: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sums ``[splits, batch, outputs]`` of stretches, for a block of outputs and a span of inputs."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(1)
    end = tl.minimum((split + 1) * span, inputs)
    item = tl.arange(0, BATCH)
    total = tl.zeros((OUTPUTS, BATCH), tl.float32)
    for start in tl.range(split * span, end, INPUTS, num_stages=STAGES):
        index = start + tl.arange(0, INPUTS)
        mask = (item < batch)[:, None] & (index < end)[None, :]
        value = tl.load(x + item[:, None] * inputs + index[None, :], mask=mask, other=0.0)
        kept = tl.max((value != 0.0).to(tl.int32), axis=0) != 0
        cell = data + index.to(tl.int64)[None, :] * stretch + output[:, None]
        w = tl.load(cell, mask=(output < outputs)[:, None] & kept[None, :], other=0)
        total = add_product(total, w, value)
    store(sums + split * batch * outputs, total, output, outputs, batch, BATCH)


@triton.jit
def _collect_kernel(sums, scale, bias, y, outputs, n, splits, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """``y [batch, n]`` from the sums of all splits."""
    row = tl.program_id(1)
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = output < n
    apart = tl.num_programs(1) * outputs
    result = _collected(sums + row * outputs, scale, bias, output, inside, apart, splits)
    if ACTIVATION is not None:
        up = _collected(sums + row * outputs, scale, bias, output + n, inside, apart, splits)
        result = activated(result, ACTIVATION) * up
    tl.store(y + row * n + output, result, mask=inside)


@triton.jit
def _collected(sums, scale, bias, output, inside, apart, splits):
    total = tl.load(sums + output, mask=inside, other=0.0)
    for split in range(1, splits):
        total += tl.load(sums + split * apart + output, mask=inside, other=0.0)
    if scale is not None:
        total *= tl.load(scale + output, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + output, mask=inside, other=0.0)
    return total
