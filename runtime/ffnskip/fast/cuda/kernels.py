# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803, SIM102
"""Triton kernels: products of weight matrices with the few rows of a decode step. Experimental: see `cuda_step`.

Such a product takes as long as its weights take to read. A kernel that is told which rows skip reads a matrix only
where a row needs it: programs whose matrix nobody needs return at once. All of them accumulate in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ffnskip.fast.fused_model import Activation
from ffnskip.fast.skipping import FusedCompensation
from ffnskip.fast.step import MAX_BATCH
from ffnskip.model.int4 import GROUP
from ffnskip.model.matrix import Matrix

INTERPRETED = bool(triton.knobs.runtime.interpret)
# The interpreter multiplies the bits of bfloat16 as if they were integers.
_EXACT = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)
_GROUP = tl.constexpr(GROUP)


@dataclass(frozen=True, eq=False)
class Skipping:
    """Who skips a layer's FFN, and what is added there (`FusedCompensation`).

    Attributes:
        rows: ``[batch]`` int32, 1 for the rows that skip.
        compensation: the layer's.
        z: ``[batch, rank]`` float32, ``first x``, or ``x`` itself without a first factor.
        a: ``[batch, n]`` float32, the activations of the compensation's neurons.
    """

    rows: Tensor
    compensation: FusedCompensation
    z: Tensor
    a: Tensor


def project(matrix: Matrix, x: Tensor, y: Tensor) -> None:
    """``y [batch, rows] = matrix x`` for ``x [batch, columns]``, both float32."""
    tile = _tile(matrix, len(x))
    grid = (triton.cdiv(matrix.rows, tile["ROWS"]),)
    _project_kernel[grid](matrix.data, matrix.scale, matrix.bias, x, y, matrix.rows, matrix.columns, len(x), **tile)


def activate(gate_up: Matrix, activation: Activation, x: Tensor, a: Tensor, skipping: Skipping | None = None) -> None:
    """First half of an FFN, ``a = act(gate x) * (up x)``, and of its compensation.

    Args:
        gate_up: ``[2 * intermediate, hidden]``, the activation being that of the gate.
        x: ``[batch, hidden]`` float32.
        a: ``[batch, intermediate]`` float32, written if a row runs the FFN.
        skipping: its `z` (where there is a first factor) and `a` are written if a row skips; None where all run.
    """
    tile = _tile(gate_up, len(x), rows=16)
    first = skipping.compensation.first if skipping else None
    neurons = skipping.compensation.neurons if skipping else None
    rank, n = 0 if first is None else first.rows, 0 if neurons is None else len(neurons)
    intermediate, per_program = gate_up.rows // 2, tile["ROWS"] // 2
    grid = (triton.cdiv(rank, tile["ROWS"]) + triton.cdiv(n, per_program) + triton.cdiv(intermediate, per_program),)
    _activate_kernel[grid](
        gate_up.data, gate_up.scale, gate_up.bias, a, intermediate,
        first and first.data, skipping and skipping.z, rank, neurons, skipping and skipping.a, n,
        x, skipping and skipping.rows, gate_up.columns, len(x), ACTIVATION=activation, **tile,
    )  # fmt: skip


def contract(down: Matrix, a: Tensor, y: Tensor, skipping: Skipping | None = None) -> None:
    """Second half: ``y = down a`` for rows that run, ``y = second z + down a + bias`` of `skipping` for the others.

    Args:
        down: ``[hidden, intermediate]``.
        a: ``[batch, intermediate]`` float32.
        y: ``[batch, hidden]`` float32, written.
        skipping: None where all run.
    """
    tile = _tile(down, len(a))
    second = skipping.compensation.second if skipping else None
    neurons_down = skipping.compensation.down if skipping else None
    _contract_kernel[(triton.cdiv(down.rows, tile["ROWS"]),)](
        down.data, down.scale, down.bias, a, down.columns,
        second and second.data, skipping and skipping.z, second.columns if second else 0,
        neurons_down and neurons_down.data, skipping and skipping.a, neurons_down.columns if neurons_down else 0,
        skipping and skipping.compensation.bias, skipping and skipping.rows, y, down.rows, len(a), **tile,
    )  # fmt: skip


def _tile(matrix: Matrix, batch: int, rows: int = 8) -> dict[str, int]:
    """What of a matrix a program holds at a time: enough bytes on their way, and enough programs."""
    # One row of a batch is multiplied by plain arithmetic, more by tensor cores, whose tiles are 16 wide.
    bytes_each = matrix.data.element_size()
    if batch == 1:
        return {"BATCH": 1, "ROWS": rows, "COLUMNS": 1024 // bytes_each, "STAGES": 3}
    return {"BATCH": MAX_BATCH, "ROWS": 32, "COLUMNS": min(128, 256 // bytes_each), "STAGES": 3}


@triton.jit
def _project_kernel(
    data, scale, bias, x, y, rows, columns, batch,
    BATCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = _multiply(data, scale, bias, row, row < rows, x, columns, batch, BATCH, COLUMNS, STAGES)
    store(y, total, row, rows, batch, BATCH)


@triton.jit
def _activate_kernel(
    gate_up, scale, bias, a, intermediate, first, z, rank, neurons, b, n, x, skip, hidden, batch,
    ACTIVATION: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    runs, skips = _needed(skip, batch, BATCH)
    # The compensation's programs come first: where all rows skip, they need not wait for the others to return.
    of_neurons = tl.program_id(0) - tl.cdiv(rank, ROWS)
    of_ffn = of_neurons - tl.cdiv(n, ROWS // 2)
    lane = tl.arange(0, ROWS)
    if of_ffn >= 0:
        if runs:
            neuron = of_ffn * (ROWS // 2) + lane // 2
            row = neuron + lane % 2 * intermediate
            pairs = _multiply(
                gate_up, scale, bias, row, neuron < intermediate, x, hidden, batch, BATCH, COLUMNS, STAGES
            )
            _store_activated(a, pairs, of_ffn, intermediate, batch, ACTIVATION, BATCH, ROWS)
    elif of_neurons >= 0:
        if neurons is not None:
            if skips:
                index = of_neurons * (ROWS // 2) + lane // 2
                row = tl.load(neurons + index, mask=index < n, other=0) + lane % 2 * intermediate
                pairs = _multiply(gate_up, scale, bias, row, index < n, x, hidden, batch, BATCH, COLUMNS, STAGES)
                _store_activated(b, pairs, of_neurons, n, batch, ACTIVATION, BATCH, ROWS)
    else:
        if first is not None:
            if skips:
                row = tl.program_id(0) * ROWS + lane
                total = _multiply(first, None, None, row, row < rank, x, hidden, batch, BATCH, COLUMNS, STAGES)
                store(z, total, row, rank, batch, BATCH)


@triton.jit
def _contract_kernel(
    down, scale, down_bias, a, intermediate, second, z, rank, neurons_down, b, n, bias, skip, y, hidden, batch,
    BATCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    runs, skips = _needed(skip, batch, BATCH)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < hidden
    total = tl.zeros((ROWS, BATCH), tl.float32)
    if runs:
        total = _multiply(down, scale, down_bias, row, inside, a, intermediate, batch, BATCH, COLUMNS, STAGES)
    if skip is not None:
        if skips:
            g = tl.zeros((ROWS, BATCH), tl.float32) + tl.load(bias + row, mask=inside, other=0.0)[:, None]
            if second is not None:
                g += _multiply(second, None, None, row, inside, z, rank, batch, BATCH, COLUMNS, STAGES)
            if neurons_down is not None:
                g += _multiply(neurons_down, None, None, row, inside, b, n, batch, BATCH, COLUMNS, STAGES)
            item = tl.arange(0, BATCH)
            total = tl.where(tl.load(skip + item, mask=item < batch, other=0)[None, :] != 0, g, total)
    store(y, total, row, hidden, batch, BATCH)


@triton.jit
def _needed(skip, batch, BATCH: tl.constexpr):
    """Whether any row runs, and whether any skips."""
    if skip is None:
        runs = True
        skips = False
    else:
        item = tl.arange(0, BATCH)
        runs = tl.min(tl.load(skip + item, mask=item < batch, other=1), axis=0) == 0
        skips = tl.max(tl.load(skip + item, mask=item < batch, other=0), axis=0) != 0
    return runs, skips


@triton.jit
def _multiply(
    data, scale, bias, row, inside, x, columns, batch,
    BATCH: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Chosen rows of a matrix times ``x [batch, columns]``: ``[ROWS, BATCH]``. Zeros where not `inside`."""
    if data.dtype.element_ty == tl.uint8:
        total = _multiply_int4(data, scale, row, inside, x, columns, batch, BATCH, COLUMNS, STAGES)
    else:
        total = tl.zeros((row.shape[0], BATCH), tl.float32)
        item = tl.arange(0, BATCH)
        line = row.to(tl.int64)[:, None] * columns
        for start in tl.range(0, columns, COLUMNS, num_stages=STAGES):
            column = start + tl.arange(0, COLUMNS)[None, :]
            w = tl.load(data + line + column, mask=inside[:, None] & (column < columns), other=0)
            mask = (item < batch)[:, None] & (column < columns)
            total = add_product(total, w, tl.load(x + item[:, None] * columns + column, mask=mask, other=0.0))
        if scale is not None:
            total *= tl.load(scale + row, mask=inside, other=0.0)[:, None]
    if bias is not None:
        total += tl.load(bias + row, mask=inside, other=0.0)[:, None]
    return total


@triton.jit
def add_product(total, w, x):
    """``total [ROWS, BATCH] + w [ROWS, COLUMNS] x [BATCH, COLUMNS]``, exact to float32 or to a relative 2^-16."""
    if x.shape[0] == 1:
        total += tl.sum(w.to(tl.float32) * x, axis=1, keep_dims=True)
    elif w.dtype == tl.float32:
        total = tl.dot(w, tl.trans(x), total, input_precision="ieee")
    else:  # bfloat16 holds int8 exactly, and x in two pieces: tensor cores have time to spare here
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(w.to(_EXACT), tl.trans(low.to(_EXACT)), total)
        total = tl.dot(w.to(_EXACT), tl.trans(high.to(_EXACT)), total)
    return total


@triton.jit
def _multiply_int4(
    data, scale, row, inside, x, columns, batch,
    BATCH: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `_multiply`. A byte holds two numbers that lie half a group apart (`ffnskip.model.matrix`)."""
    half: tl.constexpr = _GROUP // 2
    item = tl.arange(0, BATCH)
    total = tl.zeros((row.shape[0], BATCH), tl.float32)
    line = row.to(tl.int64)[:, None] * (columns // _GROUP)
    byte = tl.arange(0, half)
    for start in tl.range(0, columns // _GROUP, COLUMNS // _GROUP, num_stages=STAGES):
        group = start + tl.arange(0, COLUMNS // _GROUP)
        real = group < columns // _GROUP
        mask = inside[:, None] & real[None, :]
        packed = tl.load(data + ((line + group) * half)[:, :, None] + byte, mask=mask[:, :, None], other=0)
        low = (packed & 15).to(tl.float32)
        high = (packed >> 4).to(tl.float32)
        factor = tl.load(scale + (line + group) * 2, mask=mask, other=0.0).to(tl.float32)
        offset = tl.load(scale + (line + group) * 2 + 1, mask=mask, other=0.0).to(tl.float32)
        for index in range(0, batch):
            address = x + index * columns + group[:, None] * _GROUP + byte[None, :]
            x_low = tl.load(address, mask=real[:, None], other=0.0)
            x_high = tl.load(address + half, mask=real[:, None], other=0.0)
            inner = tl.sum(low * x_low[None, :, :] + high * x_high[None, :, :], axis=2)
            outer = tl.sum(x_low + x_high, axis=1)[None, :]
            part = tl.sum(inner * factor + outer * offset, axis=1)
            total += tl.where(item[None, :] == index, part[:, None], 0.0)
    return total


@triton.jit
def _store_activated(
    a, pairs, block, neurons, batch,
    ACTIVATION: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store activations ``[batch, neurons]`` of a block's neurons; `pairs` alternates their gate and up."""
    gate, up = tl.split(tl.permute(tl.reshape(pairs, (ROWS // 2, 2, BATCH)), (0, 2, 1)))
    neuron = block * (ROWS // 2) + tl.arange(0, ROWS // 2)
    store(a, activated(gate, ACTIVATION) * up, neuron, neurons, batch, BATCH)


@triton.jit
def activated(gate, ACTIVATION: tl.constexpr):
    """``act(gate)``."""
    if ACTIVATION == "silu":
        factor = tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        factor = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:  # x * (1 + tanh u) / 2 is x * sigmoid(2 u)
        factor = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    return gate * factor


@triton.jit
def store(y, total, row, rows, batch, BATCH: tl.constexpr):
    """Store ``total [ROWS, BATCH]`` to ``y [batch, rows]``."""
    item = tl.arange(0, BATCH)
    tl.store(y + item[None, :] * rows + row[:, None], total, mask=(row < rows)[:, None] & (item < batch)[None, :])
