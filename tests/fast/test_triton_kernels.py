"""Each Triton kernel against plain float64; buffers, and weights that nobody needs, are poisoned with NaN."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.triton_device import ACTIVATIONS, DEVICE, NAN, Draw, blank, interpreted, near, normed, times, watched_loads
from torch import Tensor

from ffnskip.fast.cuda import kernels, kernels_stream
from ffnskip.fast.skipping import FusedCompensation
from ffnskip.model.matrix import Format, Matrix

UNTOUCHED = 7.0
FORMATS: tuple[Format, ...] = ("float32", "bfloat16", "int8", "int4")
BATCHES = (1, 3, 16)
# Of 3 and of 16 rows, and of the only one.
SKIPS = {1: ([0], [1]), 3: ([0, 0, 0], [1, 1, 1], [0, 1, 0]), 16: ([0] * 16, [1] * 16, [0] * 15 + [1])}
MIXES = [(batch, skip) for batch in BATCHES for skip in SKIPS[batch]]
HIDDEN, INTERMEDIATE, RANK, OWN = 32, 80, 5, 7  # no multiples of the blocks


def poisoned(matrix: Matrix, keep: Tensor | None = None) -> Matrix:
    """The matrix with NaN in all rows but `keep`: in its numbers, or in their scales where these are integers."""
    where = "data" if matrix.scale is None else "scale"
    numbers: Tensor = getattr(matrix, where)
    wrong = torch.full_like(numbers, NAN)
    if keep is not None:
        wrong[keep] = numbers[keep]
    return replace(matrix, **{where: wrong})


def flags(skip: list[int]) -> Tensor:
    return torch.tensor(skip, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("format", "batch", "columns"),
    # The last columns fill no block, and more than one.
    [*((format, batch, 96) for format in FORMATS for batch in BATCHES), ("float32", 1, 3), ("float32", 1, 300)],
)
def test_project_multiplies_every_format(format: Format, batch: int, columns: int) -> None:
    draw = Draw()
    matrix, x, y = draw.matrix(37, columns, format, bias=True), draw(batch, columns), blank(batch, 37)
    kernels.project(matrix, x, y)
    near(y, times(matrix, x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activate_applies_the_models_activation(activation: Any) -> None:
    draw = Draw()
    gate_up, x, a = draw.matrix(2 * INTERMEDIATE, HIDDEN, bias=True), 4 * draw(1, HIDDEN), blank(1, INTERMEDIATE)
    kernels.activate(gate_up, activation, x, a)
    gate, up = times(gate_up, x).chunk(2, dim=1)
    near(a, ACTIVATIONS[activation](gate) * up)


@pytest.mark.parametrize(("batch", "skip"), MIXES)
@pytest.mark.parametrize("format", FORMATS)
def test_activate_reads_only_what_some_row_needs(format: Format, batch: int, skip: list[int]) -> None:
    draw = Draw()
    gate_up = draw.matrix(2 * INTERMEDIATE, HIDDEN, format, bias=True)
    neurons = torch.randperm(INTERMEDIATE, generator=torch.Generator().manual_seed(1))[:OWN].to(DEVICE)
    first, x = draw.matrix(RANK, HIDDEN, "bfloat16"), draw(batch, HIDDEN)
    gate, up = times(gate_up, x).chunk(2, dim=1)
    expected, expected_z = F.silu(gate) * up, times(first, x)
    if all(skip):
        gate_up = poisoned(gate_up, keep=torch.cat([neurons, neurons + INTERMEDIATE]))
    if not any(skip):
        first = poisoned(first)
    a, z, b = blank(batch, INTERMEDIATE), blank(batch, RANK), blank(batch, OWN)
    if all(skip):
        a.fill_(UNTOUCHED)
    if not any(skip):
        z.fill_(UNTOUCHED)
        b.fill_(UNTOUCHED)
    added = FusedCompensation(None, 0.0, first, None, neurons.int(), None, draw(HIDDEN))
    kernels.activate(gate_up, "silu", x, a, kernels.Skipping(flags(skip), added, z, b))
    if all(skip):
        assert (a == UNTOUCHED).all()
    else:
        near(a, expected)
    if any(skip):
        near(z, expected_z)
        near(b, expected[:, neurons])
    else:
        assert (z == UNTOUCHED).all()
        assert (b == UNTOUCHED).all()


@pytest.mark.parametrize(("batch", "skip"), MIXES)
@pytest.mark.parametrize("format", FORMATS)
def test_contract_gives_each_row_its_ffn_or_its_compensation(format: Format, batch: int, skip: list[int]) -> None:
    draw = Draw()
    down, a = draw.matrix(HIDDEN, 96, format, bias=True), draw(batch, 96)
    second, z, neurons_down, b = (
        draw.matrix(HIDDEN, RANK),
        draw(batch, RANK),
        draw.matrix(HIDDEN, OWN),
        draw(batch, OWN),
    )
    added = FusedCompensation(None, 0.0, None, second, None, neurons_down, draw(HIDDEN))
    skipping = flags(skip)
    expected = torch.where(
        skipping[:, None] != 0, times(second, z) + times(neurons_down, b) + added.bias, times(down, a)
    )
    if all(skip):
        down, a = poisoned(down), blank(*a.shape)
    if not any(skip):
        added = replace(added, second=poisoned(second), down=poisoned(neurons_down), bias=blank(HIDDEN))
        z, b = blank(*z.shape), blank(*b.shape)
    y = blank(batch, HIDDEN)
    kernels.contract(down, a, y, kernels.Skipping(skipping, added, z, b))
    near(y, expected)


@interpreted
@pytest.mark.parametrize(("batch", "skip"), MIXES)
def test_weights_that_no_row_needs_are_never_read(batch: int, skip: list[int]) -> None:
    draw = Draw()
    gate_up, down, first = draw.matrix(2 * INTERMEDIATE, HIDDEN), draw.matrix(HIDDEN, 96), draw.matrix(RANK, HIDDEN)
    second, neurons_down = draw.matrix(HIDDEN, RANK), draw.matrix(HIDDEN, OWN)
    neurons = torch.zeros(OWN, dtype=torch.int32)
    added = FusedCompensation(None, 0.0, first, second, neurons, neurons_down, draw(HIDDEN))
    z, b = draw(batch, RANK), draw(batch, OWN)
    x, skipping = draw(batch, HIDDEN), kernels.Skipping(flags(skip), added, z, b)
    with watched_loads() as was_read:
        kernels.activate(gate_up, "silu", x, blank(batch, INTERMEDIATE), skipping)
        kernels.contract(down, draw(batch, 96), blank(batch, HIDDEN), skipping)
    ffn = [gate_up.data[1:INTERMEDIATE], down.data]  # the neuron of row 0 runs for the compensation, too
    assert [was_read(weights) for weights in ffn] == [not all(skip)] * 2
    assert [was_read(matrix.data) for matrix in (first, second, neurons_down)] == [any(skip)] * 3


@pytest.mark.parametrize("of", ["bias", "second", "neurons"])
def test_contract_adds_up_what_a_compensation_has(of: str) -> None:
    draw = Draw()
    second = draw.matrix(HIDDEN, HIDDEN, "bfloat16") if of == "second" else None
    neurons_down = draw.matrix(HIDDEN, OWN, "bfloat16") if of == "neurons" else None
    added = FusedCompensation(None, 0.0, None, second, None, neurons_down, draw(HIDDEN))
    x, b, y = draw(3, HIDDEN), draw(3, OWN), blank(3, HIDDEN)
    kernels.contract(
        poisoned(draw.matrix(HIDDEN, 96)), blank(3, 96), y, kernels.Skipping(flags([1, 1, 1]), added, x, b)
    )
    near(y, (times(second, x) + times(neurons_down, b) + added.bias).expand(3, HIDDEN))


@pytest.mark.parametrize("damage", ["some", "none"])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_enter_ffn_asks_the_probe(batch: int, after: bool, damage: str) -> None:
    draw = Draw(batch)
    h, y, norm, probe, x = draw(batch, 37), draw(batch, 37), draw(37), draw(37), blank(batch, 37)
    behind = draw(37) if after else None
    allowed, skip = torch.arange(batch, device=DEVICE) % 3 < 2, flags([-1] * batch)
    stream = h + normed(y, behind)
    score = normed(stream, norm) @ probe.double() + 0.5
    threshold = float(score.median()) + 1e-3 if damage == "some" else float("-inf")
    asking: Any = {"probe": probe, "probe_bias": 0.5, "threshold": threshold}
    kernels_stream.enter_ffn(h, y, x, after=behind, norm=norm, eps=1e-6, skip=skip, allowed=allowed, **asking)
    near(h, stream)
    near(x, normed(stream, norm))
    assert torch.equal(skip, ((score < threshold) & allowed).int())


def test_enter_ffn_counts_down_what_remains() -> None:
    draw = Draw()
    h, y, norm, x = draw(3, 37), draw(3, 37), draw(37), blank(3, 37)
    allowed, skip, remaining = torch.ones(3, dtype=torch.bool, device=DEVICE), flags([-1] * 3), flags([0, 1, 4])
    options: Any = {"norm": norm, "eps": 1e-6, "skip": skip, "allowed": allowed, "remaining": remaining}
    kernels_stream.enter_ffn(h, y, x, after=None, **options)
    assert skip.tolist() == [0, 1, 1]
    assert remaining.tolist() == [0, 0, 3]


@pytest.mark.parametrize("after", [True, False])
def test_leave_ffn_compares_the_rows_that_ran(after: bool) -> None:
    draw = Draw()
    h, y, norm, x = draw(5, 37), draw(5, 37), draw(37), blank(5, 37)
    behind = draw(37) if after else None
    y[0] = -0.5 * h[0]  # turns the stream by nothing
    skip, remaining = flags([0, 0, 1, 0, 1]), flags([0, 0, 2, 0, 0])
    allowed = torch.tensor([True, True, True, False, True], device=DEVICE)
    added = torch.where(skip[:, None] != 0, y, normed(y, behind))
    stream = h + added
    similarity = F.cosine_similarity(h.double(), stream.double(), dim=-1)
    threshold = float(similarity[[0, 1]].mean())
    armed = 3 * ((similarity >= threshold) & allowed).int()
    expected = torch.where(skip != 0, remaining, armed)
    options: Any = {"skip": skip, "allowed": allowed, "threshold": threshold, "reach": 3, "remaining": remaining}
    kernels_stream.leave_ffn(h, y, x, after=behind, norm=norm, eps=1e-6, **options)
    near(h, stream)
    near(x, normed(stream, norm))
    assert torch.equal(remaining, expected)
    assert set(expected.tolist()) == {0, 2, 3}


@pytest.mark.parametrize("by_probe", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_count_adds_up_what_was_decided(batch: int, by_probe: bool) -> None:
    generator = torch.Generator().manual_seed(batch)
    checked = range(1, 4)
    per_layer = torch.zeros(3, 5, batch, dtype=torch.int64, device=DEVICE)
    never = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    expected = torch.zeros_like(per_layer).cpu()
    expected_never = torch.zeros_like(never).cpu()
    for _ in range(3):
        counted = torch.rand(batch, generator=generator) < 0.8
        allowed = counted & (torch.rand(batch, generator=generator) < 0.7)
        skip = (torch.rand(5, batch, generator=generator) < 0.3) & allowed
        skip[[0, 4]] = False
        flags_of_rows = skip.int().to(DEVICE), counted.to(DEVICE), allowed.to(DEVICE)
        kernels_stream.count(*flags_of_rows, per_layer, never, checked=checked, by_probe=by_probe)
        for row in range(batch):
            layers = skip[:, row].nonzero().flatten().tolist()
            expected[0, layers, row] += 1
            looked_at = [layer for layer in checked if allowed[row] and (by_probe or layer not in layers)]
            expected[1, looked_at, row] += 1
            expected[2, layers[:1], row] += 1
            expected_never[row] += bool(counted[row]) and not layers
    assert torch.equal(per_layer.cpu(), expected)
    assert torch.equal(never.cpu(), expected_never)
