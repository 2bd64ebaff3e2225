"""For a limit on quality, find the largest ratio whose measured cost stays within it, on the calibration text."""

from __future__ import annotations

from ffnskip.errors import FfnskipError
from ffnskip.profiles.profile import Profile
from ffnskip_cli.calibration.lab import Lab, Sizes
from ffnskip_cli.calibration.recording.record import Record, sample_size
from ffnskip_cli.calibration.settings import Goal
from ffnskip_cli.calibration.threshold.solve import highest_ratio, solve_threshold
from ffnskip_cli.calibration.threshold.verify import Bracket, Verified, behind_prompts

LIMIT_TOKENS = 4096  # of the calibration text that the cost is measured on
NEARLY = 0.95  # of the limit: where looking for a larger ratio stops
ROUNDS = 8
_FIRST_GUESS = 0.1
_STEEPEST = 4.0  # times what is aimed at: the most that a cost counts as


def largest_within(lab: Lab, profile: Profile, record: Record, goal: Goal, limit: float) -> Verified:
    """Find the largest ratio that costs at most `limit`.

    Args:
        lab: with the dense model.
        profile: whose threshold is sought; the rest of its rule stays.
        record: of the calibration text.
        goal: what is held against the limit.
        limit: in the goal's unit; at most the goal's own.

    Raises:
        FfnskipError: every ratio tried costs more, or the region is too small to skip anything.
    """
    tokens = record.first(LIMIT_TOKENS).sequences
    most, aim = highest_ratio(record, profile.skip), limit * (1.0 + NEARLY) / 2
    if most == 0.0:
        raise FfnskipError(
            f"Nothing can be skipped from layer {profile.skip.cold_s} to {profile.skip.cold_e - 1}: with --rule "
            f"{profile.skip.rule} {profile.skip.by.why_fewer}: choose --cold-s and --cold-e further apart."
        )
    best = Verified(profile.skip.threshold, 0.0)
    below, bracket = (0.0, -aim), None  # skipping nothing costs nothing
    asked = min(_FIRST_GUESS, most)
    for _ in range(ROUNDS):
        threshold = solve_threshold(record, profile.skip, asked)
        tried = behind_prompts(profile.with_threshold(threshold), record)
        (quality,) = lab.quality([tried], tokens, what=f"looking for {goal}")
        cost = goal.cost(quality)
        if cost <= limit and quality.skip_ratio.mean > best.ratio:
            best = Verified(threshold, quality.skip_ratio.mean)
        if cost <= limit and (cost >= NEARLY * limit or asked == most):
            break
        error = min(cost, _STEEPEST * aim) - aim  # a straight line to a cost far beyond would hardly leave zero
        if bracket is not None:
            asked = bracket.next(asked, error)
        elif cost > limit:
            bracket = Bracket(below, (asked, error))
            asked = bracket.between
        else:
            below, asked = (asked, error), min(2 * asked, most)
    if best.ratio == 0.0:
        raise FfnskipError(f"No threshold was found that gives {goal} on the calibration text: allow more.")
    return best


def passes(sizes: Sizes) -> int:
    """Forward passes at most of one `largest_within`."""
    return 2 * ROUNDS * min(sizes.recorded, sample_size(LIMIT_TOKENS, sizes.length))
