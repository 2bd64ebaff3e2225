"""Solve the threshold for a target ratio by simulating the rule on the recorded similarities."""

import torch

from ffnskip.errors import FfnskipError
from ffnskip.rules import may_skip, simulate
from ffnskip.sections import Skip
from ffnskip_cli.calibration.record import Record

ALWAYS, NEVER = -1.001, 1.001  # thresholds that every similarity passes, and that none does
_STEPS = 10**6  # per unit: a threshold in a profile has six digits


def simulated_ratio(record: Record, skip: Skip) -> float:
    """The skip_ratio that the rule has on the record: skipped FFNs / (n_layers x tokens past warm-up)."""
    skipped = blocks = 0
    recorded = record.similarities.shape[1]
    allowed = may_skip(torch.arange(skip.warm_up, recorded), skip)
    for similarities in record.chunks(skip.warm_up):
        tokens = similarities.flatten(0, 1)
        skipped += int(simulate(tokens, allowed.repeat(len(similarities)), skip).sum())
        blocks += tokens.numel()
    return skipped / blocks


def highest_ratio(record: Record, skip: Skip) -> float:
    """The ratio at which every token triggers as soon as it can."""
    return simulated_ratio(record, skip.model_copy(update={"threshold": ALWAYS}))


def refuse_beyond(record: Record, skip: Skip, ratio: float) -> float:
    """Return the highest ratio; raise FfnskipError if `ratio` is more."""
    if ratio > (most := highest_ratio(record, skip)):
        raise FfnskipError(
            f"A skip ratio of {ratio:g} cannot be reached: layers {skip.cold_s} to {skip.cold_e - 1} allow at most "
            f"{most:.3f}, because every token runs at least the FFN that triggers it; --cold-s, --cold-e and --window "
            "decide that."
        )
    return most


def solve_threshold(record: Record, skip: Skip, ratio: float) -> float:
    """The highest threshold at which the simulated ratio reaches `ratio`, to six digits.

    By bisection: the ratio falls as the threshold rises. With a `window` it can rise again by a few skips where an
    earlier trigger would use up its window before better layers come; the solution is then one of several.

    Args:
        record: the dense model's similarities.
        skip: the rule; its threshold is ignored.
        ratio: skip_ratio to reach.

    Raises:
        FfnskipError: the region is too small for the ratio.
    """
    refuse_beyond(record, skip, ratio)
    low, high = round(ALWAYS * _STEPS), round(NEVER * _STEPS)  # whole steps, so that what is returned was simulated
    while high - low > 1:
        middle = (low + high) // 2
        reached = simulated_ratio(record, skip.model_copy(update={"threshold": middle / _STEPS})) >= ratio
        low, high = (middle, high) if reached else (low, middle)
    return low / _STEPS
