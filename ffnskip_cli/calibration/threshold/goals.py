"""Reach each goal with a threshold, and measure on held-out text what that and other thresholds cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ffnskip.errors import FfnskipError
from ffnskip.profiles.profile import Profile
from ffnskip_cli.calibration.lab import Lab, Sizes, Step
from ffnskip_cli.calibration.recording.record import Record, sample_size
from ffnskip_cli.calibration.settings import Goal, Settings
from ffnskip_cli.calibration.threshold.solve import (
    VERIFY_ROUNDS,
    VERIFY_TOKENS,
    Bracket,
    Figure,
    Verified,
    behind_prompts,
    highest_ratio,
    solve_threshold,
    verify,
)
from ffnskip_cli.measure.flops import model_cost, overhead
from ffnskip_cli.measure.quality import Quality

LIMIT_TOKENS = 4096  # of the calibration text that the cost is measured on
NEARLY = 0.95  # of the limit: where looking for a larger ratio stops
ROUNDS = 8
_FIRST_GUESS = 0.1
_STEEPEST = 4.0  # times what is aimed at: the most that a cost counts as
CURVE_POINTS = 8  # besides those of the goals
CURVE_REACH = 0.3  # the ratio that a curve reaches at least, if the region allows
ADJUSTMENTS = 3  # of a limit, where held-out text costs more or much less than the calibration text
_MUCH = 0.85  # of the limit


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


def limit_passes(sizes: Sizes) -> int:
    """Forward passes at most of one `largest_within`."""
    return 2 * ROUNDS * min(sizes.recorded, sample_size(LIMIT_TOKENS, sizes.length))


@dataclass(frozen=True)
class Solved:
    """The goals that were reached, and a sentence for each that was not."""

    reached: dict[Goal, Verified]
    refused: list[str]


@dataclass
class HeldOut:
    """What thresholds of a draft cost on the held-out text, each measured once.

    Attributes:
        qualities: what has been measured, by threshold.
    """

    lab: Lab
    draft: Profile
    tokens: Tensor
    qualities: dict[float, Quality] = field(default_factory=dict)

    def measure(self, thresholds: set[float]) -> None:
        """Measure those that have not been."""
        if not (new := sorted(thresholds - self.qualities.keys(), reverse=True)):
            return
        qualities = self.lab.quality([self.draft.with_threshold(threshold) for threshold in new], self.tokens)
        self.qualities |= dict(zip(new, qualities, strict=True))


@dataclass(frozen=True)
class SolveStage:
    """Find each goal's threshold in the running model; one goal that has none must not cost the others theirs."""

    settings: Settings

    def run(self, lab: Lab, record: Record, held_out: HeldOut) -> Solved:
        """Solve on the calibration text's `record`, and hold limits against the held-out text, too."""
        reached: dict[Goal, Verified] = {}
        refused = []
        for goal in self.settings.goals:
            try:
                reached[goal] = _reach(lab, record, goal, held_out)
            except FfnskipError as error:
                refused.append(str(error))
        return Solved(reached, refused)

    def cost(self, sizes: Sizes) -> list[Step]:
        """Rounds of verifying a ratio, or of looking for the ratio that keeps a limit."""
        limits = sum(goal.is_limit for goal in self.settings.goals)
        verifying = VERIFY_ROUNDS * min(sizes.recorded, sample_size(VERIFY_TOKENS, sizes.length))
        passes = (len(self.settings.goals) - limits) * verifying + limits * ADJUSTMENTS * limit_passes(sizes)
        return [Step("solve and verify", passes)]


@dataclass(frozen=True)
class MeasureStage:
    """Measure the solved thresholds, and a curve of others to move along later, on the held-out text."""

    settings: Settings
    curve_points: int = CURVE_POINTS

    def run(self, record: Record, held_out: HeldOut, solved: Solved) -> None:
        """Fill in `held_out.qualities`; measures nothing where no goal was reached."""
        if solved.reached:
            solutions = solved.reached.values()
            largest = max(solution.ratio for solution in solutions)
            curve = _curve(record, held_out.draft, largest, self.curve_points)
            held_out.measure({*curve, *(solution.threshold for solution in solutions)})

    def cost(self, sizes: Sizes) -> list[Step]:
        """The dense model, the curve and the goals; a limit is measured whenever it is adjusted."""
        limits = sum(goal.is_limit for goal in self.settings.goals)
        thresholds = self.curve_points + len(self.settings.goals) + 1 + 2 * ADJUSTMENTS * limits
        return [Step("measure quality", thresholds * sizes.held_out)]


def _reach(lab: Lab, record: Record, goal: Goal, held_out: HeldOut) -> Verified:
    draft = held_out.draft
    if goal.kind == "target_ratio":
        return verify(lab, draft, record, goal.value)
    if goal.kind == "target_flops":
        return verify(lab, draft, record, goal.value, _flops_saved(lab, draft, record))
    allowed, best = goal.value, None
    for _ in range(ADJUSTMENTS):
        solution = largest_within(lab, draft, record, goal, allowed)
        held_out.measure({solution.threshold})
        cost = goal.cost(held_out.qualities[solution.threshold])
        if cost <= goal.value and (best is None or solution.ratio > best.ratio):
            best = solution
        if cost <= 0 or _MUCH * goal.value <= cost <= goal.value:
            break
        allowed *= NEARLY * goal.value / cost  # so that a solution at the very limit would be within the goal
    if best is None:
        raise FfnskipError(f"No threshold was found that gives {goal} on the held-out text, too: allow more.")
    return best


def _flops_saved(lab: Lab, draft: Profile, record: Record) -> Figure:
    """The share of all FLOPs past warm-up that is saved, all overhead charged."""
    cost, added = model_cost(lab.model), overhead(draft, lab.model)
    first, length = record.prompt_tokens + draft.skip.warm_up, record.sequences.shape[1]
    flops = cost.dense_flops(first, length) / (length - first)  # of a mean token past warm-up
    return Figure(
        "A share of the FLOPs",
        lambda stats: cost.saved_flops(stats, added) / (max(stats.tokens, 1) * flops),
        scale=cost.n_layers * cost.ffn_flops / flops,
    )


def _curve(record: Record, draft: Profile, largest: float, points: int) -> set[float]:
    """Thresholds at even steps of the ratio, well beyond the largest one that was solved for."""
    reach = min(highest_ratio(record, draft.skip), max(CURVE_REACH, 2 * largest))
    ratios = [reach * step / points for step in range(1, points + 1)]
    return {solve_threshold(record, draft.skip, ratio) for ratio in ratios}
