"""Solve the threshold for a target ratio by simulating the rule on what was recorded."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ffnskip.errors import FfnskipError
from ffnskip.rules import may_skip, simulate
from ffnskip.sections import Skip
from ffnskip_cli.calibration.record import Record


@dataclass(frozen=True)
class Scale:
    """The thresholds of a rule, as whole steps: the more steps, the less is skipped.

    Attributes:
        always, never: steps whose thresholds everything passes, and nothing does.
    """

    always: int
    never: int
    threshold: Callable[[int], float]


# A similarity has six digits; nats have five, from 1e-9 to 1e5, and their threshold falls as the steps rise.
SCALES = {
    "cosine": Scale(-1_001_000, 1_001_000, lambda step: step / 10**6),
    "predicted-damage": Scale(-115_000, 207_000, lambda step: float(f"{math.exp(-step / 10**4):.5g}")),
}


def simulated_ratio(record: Record, skip: Skip) -> float:
    """The skip_ratio that the rule has on the record: skipped FFNs / (n_layers x tokens past warm-up)."""
    skipped = blocks = 0
    recorded = record.values.shape[1]
    allowed = may_skip(torch.arange(skip.warm_up, recorded), skip)
    for values in record.chunks(skip.warm_up):
        tokens = values.flatten(0, 1)
        skipped += int(simulate(tokens, allowed.repeat(len(values)), skip).sum())
        blocks += tokens.numel()
    return skipped / blocks


def highest_ratio(record: Record, skip: Skip) -> float:
    """The ratio at which every token skips as soon as it can."""
    scale = SCALES[skip.rule]
    return simulated_ratio(record, skip.model_copy(update={"threshold": scale.threshold(scale.always)}))


def refuse_beyond(record: Record, skip: Skip, ratio: float) -> float:
    """Return the highest ratio; raise FfnskipError if `ratio` is more."""
    if ratio > (most := highest_ratio(record, skip)):
        why = (
            "because every token runs at least the FFN that triggers it; --cold-s, --cold-e and --window decide that"
            if skip.rule == "cosine"
            else "as --cold-s and --cold-e say"
        )
        raise FfnskipError(
            f"A skip ratio of {ratio:g} cannot be reached: layers {skip.cold_s} to {skip.cold_e - 1} allow at most "
            f"{most:.3f}, {why}."
        )
    return most


def solve_threshold(record: Record, skip: Skip, ratio: float) -> float:
    """The strictest threshold at which the simulated ratio reaches `ratio`, on the rule's `SCALES`.

    By bisection. With a `window` the ratio can rise by a few skips as the threshold gets stricter, where an earlier
    trigger would use up its window before better layers come; the solution is then one of several.

    Args:
        record: the dense model's similarities, or the scores of the model's probes.
        skip: the rule; its threshold is ignored.
        ratio: skip_ratio to reach.

    Raises:
        FfnskipError: the region is too small for the ratio.
    """
    refuse_beyond(record, skip, ratio)
    scale = SCALES[skip.rule]
    low, high = scale.always, scale.never  # whole steps, so that what is returned was simulated
    while high - low > 1:
        middle = (low + high) // 2
        tried = skip.model_copy(update={"threshold": scale.threshold(middle)})
        low, high = (middle, high) if simulated_ratio(record, tried) >= ratio else (low, middle)
    return scale.threshold(low)
