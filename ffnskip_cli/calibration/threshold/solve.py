"""Solve the threshold for a target ratio by simulating the rule on what was recorded."""

import torch

from ffnskip.errors import FfnskipError
from ffnskip.profiles.schema import Skip
from ffnskip.rules import may_skip
from ffnskip_cli.calibration.recording.record import Record


def simulated_ratio(record: Record, skip: Skip) -> float:
    """The skip_ratio that the rule has on the record: skipped FFNs / (n_layers x tokens past warm-up)."""
    skipped, blocks = 0.0, 0
    recorded = record.values.shape[1]
    allowed = may_skip(torch.arange(skip.warm_up, recorded), skip)
    for values in record.chunks(skip.warm_up):
        tokens = values.flatten(0, 1)
        skipped += float(skip.by.simulate(tokens, allowed.repeat(len(values)), skip).sum(dtype=torch.float64))
        blocks += tokens.shape[0] * tokens.shape[1]
    return skipped / blocks


def highest_ratio(record: Record, skip: Skip) -> float:
    """The ratio at which every token skips as soon as it can."""
    rule = skip.by
    return simulated_ratio(record, skip.model_copy(update={"threshold": rule.threshold_at(rule.steps[0])}))


def refuse_beyond(record: Record, skip: Skip, ratio: float) -> float:
    """Return the highest ratio; raise FfnskipError if `ratio` is more."""
    if ratio > (most := highest_ratio(record, skip)):
        fewer = skip.by.why_fewer
        why = "as --cold-s and --cold-e say"
        if fewer:
            why = f"because {fewer}; --cold-s, --cold-e and --window decide that"
        raise FfnskipError(
            f"A skip ratio of {ratio:g} cannot be reached: layers {skip.cold_s} to {skip.cold_e - 1} allow at most "
            f"{most:.3f}, {why}."
        )
    return most


def solve_threshold(record: Record, skip: Skip, ratio: float) -> float:
    """The strictest threshold at which the simulated ratio reaches `ratio`, among the rule's steps.

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
    rule = skip.by
    low, high = rule.steps[0], rule.steps[-1]  # whole steps, so that what is returned was simulated
    while high - low > 1:
        middle = (low + high) // 2
        tried = skip.model_copy(update={"threshold": rule.threshold_at(middle)})
        low, high = (middle, high) if simulated_ratio(record, tried) >= ratio else (low, middle)
    return rule.threshold_at(low)
