# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803, SIM108
"""Triton kernels: the residual stream, the decision who skips, and the counts. One program per row of the batch.

Experimental: see `cuda_step`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def enter_ffn(
    h: Tensor,
    y: Tensor,
    x: Tensor,
    *,
    after: Tensor | None,
    norm: Tensor,
    eps: float,
    skip: Tensor | None = None,
    allowed: Tensor | None = None,
    probe: Tensor | None = None,
    probe_bias: float = 0.0,
    threshold: float = 0.0,
    remaining: Tensor | None = None,
) -> None:
    """Add what attention gave to the stream, norm it for the FFN, and decide who skips that.

    A row skips if its damage by the probe is under the threshold and it is allowed to; without a probe, if it has FFNs
    remaining that it skips, of which this is one.

    Args:
        h: residual stream, ``[batch, hidden]`` float32; ``norm(y)`` is added.
        y: output of the attention block, ``[batch, hidden]`` float32.
        x: what the FFN reads, ``[batch, hidden]`` float32; written.
        after: weight of the norm behind attention, ``[hidden]`` float32; None where there is none.
        norm: weight of the norm in front of the FFN, ``[hidden]`` float32.
        eps: of the norms.
        skip: ``[batch]`` int32, written: 1 for the rows that skip. None in a layer where nobody may.
        allowed: ``[batch]`` bool.
        probe: ``[hidden]`` float32, or None for the rule `cosine`.
        probe_bias: its intercept, in log nats.
        threshold: of the damage, in log nats.
        remaining: ``[batch]`` int32, how many FFNs each row still skips; counted down. Used without a probe.
    """
    batch, hidden = h.shape
    options = {"HIDDEN": triton.next_power_of_2(hidden), "num_warps": 8}
    _enter_kernel[(batch,)](
        h, y, after, norm, x, skip, allowed, probe, remaining, probe_bias, threshold, eps, hidden, **options
    )


def leave_ffn(
    h: Tensor,
    y: Tensor,
    x: Tensor,
    *,
    after: Tensor | None,
    norm: Tensor,
    eps: float,
    skip: Tensor | None = None,
    allowed: Tensor | None = None,
    threshold: float = 0.0,
    reach: int = 0,
    remaining: Tensor | None = None,
) -> None:
    """Add what the FFN gave to the stream, compare the two, and norm the stream for what comes next.

    Args:
        h: residual stream, ``[batch, hidden]`` float32; ``norm(y)`` is added, or `y` itself in rows that skipped.
        y: output of the FFN or what stands in its place, ``[batch, hidden]`` float32.
        x: ``[batch, hidden]`` float32; written.
        after: weight of the norm behind the FFN, ``[hidden]`` float32; None where there is none.
        norm: weight of the next norm, ``[hidden]`` float32.
        eps: of the norms.
        skip: ``[batch]`` int32, 1 for the rows that skipped; None in a layer where nobody may.
        allowed: ``[batch]`` bool.
        threshold: of the similarity.
        reach: how many FFNs a row skips once it reaches that.
        remaining: ``[batch]`` int32, how many each row still skips, set for the rows that ran; None: do not compare.
    """
    batch, hidden = h.shape
    options = {"HIDDEN": triton.next_power_of_2(hidden), "num_warps": 8}
    _leave_kernel[(batch,)](h, y, after, norm, x, skip, allowed, remaining, threshold, reach, eps, hidden, **options)


def count(
    skip: Tensor, counted: Tensor, allowed: Tensor, per_layer: Tensor, never: Tensor, *, checked: range, by_probe: bool
) -> None:
    """Count what was decided for one token per row, as `ffnskip.SkipStats` does.

    Args:
        skip: ``[n_layers, batch]`` int32.
        counted: ``[batch]`` bool, which rows are past warm-up.
        allowed: ``[batch]`` bool, which of these may skip.
        per_layer: ``[3, n_layers, batch]`` int64: skipped, checked and first skipped; added to.
        never: ``[batch]`` int64, tokens without a skip; added to.
        checked: the layers in which a row is looked at.
        by_probe: whether it is looked at before the FFN, so that rows that skip are checked too.
    """
    n_layers, batch = skip.shape
    options = {"BY_PROBE": by_probe, "LAYERS": triton.next_power_of_2(n_layers), "num_warps": 1}
    _count_kernel[(batch,)](
        skip, counted, allowed, per_layer, never, checked.start, checked.stop, n_layers, batch, **options
    )


@triton.jit
def _enter_kernel(
    h, y, after, norm, x, skip, allowed, probe, remaining, probe_bias, threshold, eps, hidden, HIDDEN: tl.constexpr
):
    row = tl.program_id(0)
    column = tl.arange(0, HIDDEN)
    inside = column < hidden
    cell = row * hidden + column
    added = tl.load(y + cell, mask=inside, other=0.0)
    if after is not None:
        added = _normed(added, after, column, inside, eps, hidden)
    stream = tl.load(h + cell, mask=inside, other=0.0) + added
    tl.store(h + cell, stream, mask=inside)
    normed = _normed(stream, norm, column, inside, eps, hidden)
    tl.store(x + cell, normed, mask=inside)
    if probe is not None:
        score = tl.sum(normed * tl.load(probe + column, mask=inside, other=0.0), axis=0) + probe_bias
        decision = (score < threshold) & (tl.load(allowed + row) != 0)
        tl.store(skip + row, decision.to(tl.int32))
    elif skip is not None:
        left = tl.load(remaining + row)
        decision = (left > 0).to(tl.int32)
        tl.store(skip + row, decision)
        tl.store(remaining + row, left - decision)


@triton.jit
def _leave_kernel(h, y, after, norm, x, skip, allowed, remaining, threshold, reach, eps, hidden, HIDDEN: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, HIDDEN)
    inside = column < hidden
    cell = row * hidden + column
    added = tl.load(y + cell, mask=inside, other=0.0)
    if after is not None:
        normed = _normed(added, after, column, inside, eps, hidden)
        if skip is not None:  # what stands in a skipped FFN's place stands for the norm as well
            added = tl.where(tl.load(skip + row) != 0, added, normed)
        else:
            added = normed
    before = tl.load(h + cell, mask=inside, other=0.0)
    stream = before + added
    if remaining is not None:
        lengths = tl.sqrt_rn(tl.sum(before * before, axis=0)) * tl.sqrt_rn(tl.sum(stream * stream, axis=0))
        similarity = tl.sum(before * stream, axis=0) / tl.maximum(lengths, 1e-8)
        reached = (similarity >= threshold) & (tl.load(allowed + row) != 0)
        left = tl.load(remaining + row)
        tl.store(remaining + row, tl.where(tl.load(skip + row) != 0, left, tl.where(reached, reach, 0)))
    tl.store(h + cell, stream, mask=inside)
    tl.store(x + cell, _normed(stream, norm, column, inside, eps, hidden), mask=inside)


@triton.jit
def _normed(vector, weight, column, inside, eps, hidden):
    """Root mean square norm of a vector that is zero where not `inside`."""
    mean_square = tl.sum(vector * vector, axis=0) / hidden
    return vector * tl.rsqrt(mean_square + eps) * tl.load(weight + column, mask=inside, other=0.0)


@triton.jit
def _count_kernel(
    skip, counted, allowed, per_layer, never, first_checked, end_checked, n_layers, batch,
    BY_PROBE: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    layer = tl.arange(0, LAYERS)
    inside = layer < n_layers
    skipped = tl.load(skip + layer * batch + row, mask=inside, other=0)
    checked = (layer >= first_checked) & (layer < end_checked) & (tl.load(allowed + row) != 0)
    if not BY_PROBE:
        checked &= skipped == 0
    first = (skipped != 0) & (tl.cumsum(skipped, axis=0) == 1)
    cell = per_layer + layer * batch + row
    _add(cell, skipped, inside)
    _add(cell + n_layers * batch, checked, inside)
    _add(cell + 2 * n_layers * batch, first, inside)
    no_skip = (tl.load(counted + row) != 0) & (tl.sum(skipped, axis=0) == 0)
    tl.store(never + row, tl.load(never + row) + no_skip.to(tl.int64))


@triton.jit
def _add(cell, amount, inside):
    tl.store(cell, tl.load(cell, mask=inside, other=0) + amount.to(tl.int64), mask=inside)
