"""From a recording to profiles: choose the rule, fit, solve and verify the thresholds, measure what they cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ffnskip.errors import FfnskipError
from ffnskip.general.apply import self_check
from ffnskip.profiles.profile import Profile
from ffnskip_cli.calibration import assemble
from ffnskip_cli.calibration.recording.file import Statistics
from ffnskip_cli.calibration.recording.record import Record
from ffnskip_cli.calibration.rules.cosine.choose import choose_cosine
from ffnskip_cli.calibration.rules.predicted_damage import choose_damage, compensate
from ffnskip_cli.calibration.settings import Goal, Settings
from ffnskip_cli.calibration.threshold.limit import NEARLY, largest_within
from ffnskip_cli.calibration.threshold.solve import highest_ratio, solve_threshold
from ffnskip_cli.calibration.threshold.verify import Verified, verify
from ffnskip_cli.journal import Journal
from ffnskip_cli.measure.flops import model_cost, overhead
from ffnskip_cli.measure.quality import Quality, check_size, measure_quality
from ffnskip_cli.text.corpus import Corpus
from ffnskip_cli.track import Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CURVE_POINTS = 8  # besides those of the goals
CURVE_REACH = 0.3  # the ratio that a curve reaches at least, if the region allows
ADJUSTMENTS = 3  # of a limit, where held-out text costs more or much less than the calibration text
_MUCH = 0.85  # of the limit


@dataclass(frozen=True)
class Calibrated:
    """A finished profile, what it was made for, and the ratio that was verified on the calibration text."""

    goal: Goal
    profile: Profile
    calibration_ratio: float


@dataclass(frozen=True)
class Calibration:
    """What came of the goals: the profiles of those that were reached, and a sentence for each that was not."""

    finished: list[Calibrated]
    refused: list[str]


def calibrate(
    model: PreTrainedModel,
    statistics: Statistics,
    held_out: Corpus,
    settings: Settings,
    track: Track,
    journal: Journal | None = None,
    fit_text: Corpus | None = None,
) -> Calibration:
    """Compile one profile per goal. All of them have one rule and differ in the threshold.

    Args:
        model: the dense model.
        statistics: the whole recording of the calibration text.
        held_out: text of which nothing was calibrated on, for quality.
        settings: the choices.
        track: shows progress.
        journal: remembers what was measured.
        fit_text: text to fit probe and compensation to, if the settings ask for any.

    Raises:
        FfnskipError: the model cannot be wrapped, its curve has no plateau, the region is too small for a target, or
            there is too little text.
    """
    journal = journal or Journal()
    check_size(held_out.tokens, 0 if settings.warm_up == "auto" else settings.warm_up)  # now, as the run is long
    record = statistics.record
    if settings.rule == "predicted-damage":
        assert fit_text is not None, "there is no text to fit to"
        draft, record = choose_damage(model, statistics, fit_text, settings, track, journal)
    else:
        draft = choose_cosine(model, statistics, settings, track, journal)
        if settings.fits:
            assert fit_text is not None, "there is no text to fit to"
            draft = compensate(model, draft, fit_text, statistics.record.sequences, settings, track, journal)
    check_size(held_out.tokens, draft.skip.warm_up)
    self_check(model, draft)
    described = draft.model_copy(
        update={
            "calibration": statistics.identity.text,
            "evaluation": assemble.evaluation_text(held_out),
            "similarity": assemble.similarity_curve(statistics.record, draft.skip.warm_up),
        }
    )
    return _Solver(model, record, held_out, described, track, journal).solve(settings.goals)


class _Solver:
    """Solves one rule for several goals.

    Args:
        model: the dense model.
        record: of the calibration text.
        held_out: text for the measurements that the profiles report.
        draft: the profile but for its threshold, its measurements and its curve.
        track: shows progress.
        journal: remembers the measurements.
    """

    def __init__(
        self, model: PreTrainedModel, record: Record, held_out: Corpus, draft: Profile, track: Track, journal: Journal
    ) -> None:
        self._model = model
        self._record = record
        self._held_out = held_out
        self._draft = draft
        self._track = track
        self._journal = journal
        self._measured: dict[float, Quality] = {}  # by threshold, on the held-out text

    def solve(self, goals: Iterable[Goal]) -> Calibration:
        """Find each goal's threshold; one that has none must not cost the others theirs."""
        found: dict[Goal, Verified] = {}
        refused = []
        for goal in goals:
            try:
                found[goal] = self._reach(goal)
            except FfnskipError as error:
                refused.append(str(error))
        if found:
            self._measure({*self._grid(found.values()), *(solution.threshold for solution in found.values())})
        by_ratio = sorted(self._measured, key=lambda threshold: self._measured[threshold].skip_ratio.mean)
        curve = tuple(assemble.curve_point(threshold, self._measured[threshold]) for threshold in by_ratio)
        described = self._draft.model_copy(update={"curve": curve})
        finished = [
            Calibrated(goal, self._finish(described, goal, solution.threshold), solution.ratio)
            for goal, solution in found.items()
        ]
        return Calibration(finished, refused)

    def _reach(self, goal: Goal) -> Verified:
        if goal.kind == "target_ratio":
            return verify(self._model, self._draft, self._record, goal.value, self._track, self._journal)
        limit, best = goal.value, None
        for _ in range(ADJUSTMENTS):
            solution = largest_within(self._model, self._draft, self._record, goal, limit, self._track, self._journal)
            self._measure({solution.threshold})
            cost = goal.cost(self._measured[solution.threshold])
            if cost <= goal.value and (best is None or solution.ratio > best.ratio):
                best = solution
            if cost <= 0 or _MUCH * goal.value <= cost <= goal.value:
                break
            limit *= NEARLY * goal.value / cost  # so that a solution at the very limit would be within the goal
        if best is None:
            raise FfnskipError(f"No threshold was found that gives {goal} on the held-out text, too: allow more.")
        return best

    def _grid(self, solutions: Iterable[Verified]) -> set[float]:
        """Thresholds at even steps of the ratio, well beyond those asked for: the curve to move along later."""
        most = highest_ratio(self._record, self._draft.skip)
        reach = min(most, max(CURVE_REACH, *(2 * solution.ratio for solution in solutions)))
        ratios = [reach * step / CURVE_POINTS for step in range(1, CURVE_POINTS + 1)]
        return {solve_threshold(self._record, self._draft.skip, ratio) for ratio in ratios}

    def _measure(self, thresholds: set[float]) -> None:
        if not (new := sorted(thresholds - self._measured.keys(), reverse=True)):
            return
        profiles = [self._draft.with_threshold(threshold) for threshold in new]
        qualities = measure_quality(self._model, profiles, self._held_out.tokens, self._track, journal=self._journal)
        self._measured |= dict(zip(new, qualities, strict=True))

    def _finish(self, described: Profile, goal: Goal, threshold: float) -> Profile:
        length = self._held_out.tokens.shape[1]
        cost, added = model_cost(self._model), overhead(described, self._model)
        measured = assemble.measured(goal, self._measured[threshold], cost, added, length)
        return described.with_threshold(threshold).model_copy(update={"measured": measured})
