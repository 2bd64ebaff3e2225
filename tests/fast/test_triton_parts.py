"""The Triton kernels of the rule `price` against plain float64; weights that nobody needs are poisoned with NaN."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.triton_device import ACTIVATIONS, DEVICE, NAN, Draw, blank, interpreted, near, times, watched_loads
from torch import Tensor

from ffnskip.fast.cuda import kernels_parts
from ffnskip.model.matrix import Format, Matrix

BATCHES = (1, 3, 16)
ROWS, COLUMNS = 74, 300  # no multiples of the blocks, and several of these


def by_input(matrix: Matrix) -> Matrix:
    return replace(matrix, data=matrix.data.T.contiguous().T)


def thinned(batch: int) -> tuple[Tensor, Tensor]:
    """``[batch, COLUMNS]`` with many zeros in each row, and which inputs are zero in every row."""
    draw = Draw(batch)
    x = draw(batch, COLUMNS)
    x[:, draw(COLUMNS) < -0.8] = 0.0
    x[draw(batch, COLUMNS) < -0.5] = 0.0
    return x, (x == 0).all(dim=0)


@pytest.mark.parametrize("batch", BATCHES)
def test_thin_leaves_out_what_is_under_its_limit_and_counts_it(batch: int) -> None:
    draw = Draw()
    x, limit = draw(batch, 37), draw(37).abs()
    limit[3:5] = float("inf")
    x[:, 3], x[:, 5] = NAN, -limit[5]  # neither is smaller than its limit
    allowed = torch.arange(batch, device=DEVICE) % 3 != 1
    ended = torch.arange(batch, device=DEVICE) % 3 == 2
    left_out = torch.full((batch,), -1, device=DEVICE)
    leave_out = (x.abs() < limit) & allowed[:, None]
    expected = x.masked_fill(leave_out | ended[:, None], 0.0)
    kernels_parts.thin(x, limit, allowed, ended, left_out)
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)
    assert left_out.tolist() == leave_out.sum(dim=1).tolist()
    assert x[0, 3].isnan()
    assert 0 < left_out[0] < 37


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
def test_project_needs_no_weights_of_what_is_left_out(format: Format, batch: int) -> None:
    matrix = by_input(Draw().matrix(ROWS, COLUMNS, format, bias=True))
    x, nobody = thinned(batch)
    expected = times(matrix, x)
    if format != "int8":
        matrix.data[:, nobody] = NAN
    y = blank(batch, ROWS)
    kernels_parts.project(matrix, x, y)
    near(y, expected)


def test_project_spreads_what_is_not_a_number() -> None:
    matrix, y = by_input(Draw().matrix(ROWS, COLUMNS)), blank(1, ROWS)
    x, _ = thinned(1)
    x[0, 7] = NAN
    kernels_parts.project(matrix, x, y)
    assert y.isnan().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_project_applies_the_models_activation(activation: Any) -> None:
    gate_up = by_input(Draw().matrix(ROWS, 40, bias=True))
    x, a = 2 * Draw(1)(3, 40), blank(3, ROWS // 2)
    kernels_parts.project(gate_up, x, a, activation)
    gate, up = times(gate_up, x).chunk(2, dim=1)
    near(a, ACTIVATIONS[activation](gate) * up)


@interpreted
@pytest.mark.parametrize("batch", BATCHES)
def test_stretches_of_what_every_row_leaves_out_are_never_read(batch: int) -> None:
    matrix = by_input(Draw().matrix(ROWS, COLUMNS, "int8"))
    x, nobody = thinned(batch)
    with watched_loads() as was_read:
        kernels_parts.project(matrix, x, blank(batch, ROWS))
    assert [was_read(stretch) for stretch in matrix.data.T] == (~nobody).tolist()
    assert nobody.sum() > COLUMNS / 10
