"""Choose region, window and refresh by what they do to quality: the curve proposes, the closed loop disposes.

Candidates are scored by their KL at one and the same skip_ratio on a part of the calibration text, in the running
model. A challenger takes the place of what is there only if it is better beyond noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Skip
from ffnskip.rules.cosine import reach
from ffnskip_cli.budget import SEARCH_NOISE
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.recording.record import Record
from ffnskip_cli.calibration.settings import Settings
from ffnskip_cli.calibration.threshold.solve import behind_prompts, highest_ratio, solve_threshold
from ffnskip_cli.measure.quality import paired_difference

SEARCH_TOKENS = 2048  # that every candidate is scored on
WINDOWS = (1, 2, 4)
REFRESHES = (6,)  # what the authors' unpublished code does
CORRECTIONS = 1  # of the threshold, where the running model does not do what was simulated
_CLOSE = 0.05  # of the ratio: what needs no correction


@dataclass(frozen=True)
class Scored:
    """A candidate in the running model.

    Attributes:
        skip: the candidate, with a threshold that gives about the search's ratio.
        ratio: what it gives.
        kl: ``[sequences]`` float64, nats per token, in proportion at the search's ratio itself.
    """

    skip: Skip
    ratio: float
    kl: Tensor

    def lead_over(self, other: Scored) -> tuple[float, float]:
        """By how much this one's mean KL is lower, and the standard error of that, paired by sequence."""
        lead = paired_difference(other.kl, self.kl)
        return lead.mean, lead.standard_error

    def beats(self, other: Scored) -> bool:
        """Is this one better beyond noise, and not just because it hardly skips in the running model?"""
        lead, error = self.lead_over(other)
        return lead > SEARCH_NOISE * error and self.ratio > other.ratio / 2


class Scorer:
    """Scores candidates at one skip_ratio.

    Args:
        lab: with the dense model.
        draft: a profile for it; only the rule's settings are replaced.
        record: to solve thresholds on; the first `SEARCH_TOKENS` of its tokens are those scored on.
        ratio: the skip_ratio at which all are compared.
    """

    def __init__(self, lab: Lab, draft: Profile, record: Record, ratio: float) -> None:
        self.ratio = ratio
        self.n_layers = draft.model.n_layers
        self._lab = lab
        self._draft = draft
        self._record = record
        self._tokens = search_text(record)

    @property
    def tokens(self) -> int:
        """How many tokens each candidate is scored on."""
        return self._tokens.numel()

    def _is_close(self, scored: Scored) -> bool:
        return abs(scored.ratio - self.ratio) <= _CLOSE * self.ratio

    def score(self, skips: Iterable[Skip]) -> list[Scored]:
        """Score those candidates that can reach the ratio at all."""
        possible = [skip for skip in skips if self.ratio <= highest_ratio(self._record, skip)]
        best = self._measure(possible, [self.ratio] * len(possible))
        for _ in range(CORRECTIONS):
            off = [i for i, scored in enumerate(best) if not self._is_close(scored)]
            asked = [self._corrected(best[i]) for i in off]
            for i, again in zip(off, self._measure([possible[i] for i in off], asked), strict=True):
                best[i] = min(best[i], again, key=lambda scored: abs(scored.ratio - self.ratio))
        return best

    def _corrected(self, scored: Scored) -> float:
        """What to ask the simulation for, as the running model skipped more or less than it said."""
        factor = self.ratio / scored.ratio if scored.ratio else 2.0
        return min(self.ratio * factor, highest_ratio(self._record, scored.skip))

    def _measure(self, skips: Sequence[Skip], ratios: Sequence[float]) -> list[Scored]:
        if not skips:
            return []
        solved = [
            skip.model_copy(update={"threshold": solve_threshold(self._record, skip, ratio)})
            for skip, ratio in zip(skips, ratios, strict=True)
        ]
        profiles = [self._draft.model_copy(update={"skip": skip}) for skip in solved]
        qualities = self._lab.quality(
            [behind_prompts(profile, self._record) for profile in profiles],
            self._tokens,
            what=f"comparing {len(solved)} rule{'s' * (len(solved) > 1)} with the dense model",
        )
        return [
            Scored(skip, quality.skip_ratio.mean, self._in_proportion(quality.kl_by_sequence, quality.skip_ratio.mean))
            for skip, quality in zip(solved, qualities, strict=True)
        ]

    def _in_proportion(self, kl: Sequence[float], ratio: float) -> Tensor:
        """KL grows about as the ratio does; what is left of its error after a correction is made good by that."""
        return torch.tensor(kl, dtype=torch.float64) * (self.ratio / ratio if ratio else 1.0)


def search_text(record: Record) -> Tensor:
    """The sequences that candidates are scored on: the first of the permuted text."""
    return record.first(SEARCH_TOKENS).sequences


def search(scorer: Scorer, start: Skip, settings: Settings) -> list[Scored]:
    """Try windows, then refreshes, then regions, each with the best of what came before.

    Args:
        scorer: scores them.
        start: the rule as the paper has it, in the region that the curve proposes.
        settings: what is pinned, and how many candidates to try.

    Returns:
        All that were tried, the chosen one first.
    """
    contest = _Contest(scorer, settings.candidates)
    contest.enter([start])
    if settings.window == "auto":
        contest.enter([start.model_copy(update={"window": window}) for window in WINDOWS])
    if settings.refresh_every == "auto":
        contest.enter([contest.best.skip.model_copy(update={"refresh_every": every}) for every in REFRESHES])
    if settings.cold_s is None or settings.cold_e is None:
        _search_region(contest, settings, scorer.n_layers)
    assert contest.tried, "the ratio is beyond the start's region"
    return [contest.best, *(scored for scored in contest.tried if scored is not contest.best)]


class _Contest:
    """Keeps the best candidate so far, within a budget of candidates."""

    def __init__(self, scorer: Scorer, budget: int) -> None:
        self.tried: list[Scored] = []
        self._scorer = scorer
        self._budget = budget

    @property
    def best(self) -> Scored:
        return self._best

    def enter(self, challengers: list[Skip]) -> bool:
        """Score what is new among them; True if one of them is the best now."""
        known = {_settings(scored.skip) for scored in self.tried}
        new = [skip for skip in challengers if _settings(skip) not in known]
        scored = self._scorer.score(new[: max(0, self._budget - len(self.tried))])
        if not self.tried and scored:
            self._best = scored[0]
        self.tried += scored
        winners = [challenger for challenger in scored if challenger.beats(self._best)]
        if winners:
            self._best = min(winners, key=lambda winner: float(winner.kl.mean()))
        return bool(winners)


def _search_region(contest: _Contest, settings: Settings, n_layers: int) -> None:
    """Compass search (Hooke and Jeeves 1961): move either end outwards or inwards, in ever smaller steps."""
    step = max(1, n_layers // 8)
    while step:
        skip = contest.best.skip
        starts = [skip.cold_s - step, skip.cold_s + step] if settings.cold_s is None else []
        ends = [skip.cold_e - step, skip.cold_e + step] if settings.cold_e is None else []
        regions = [(start, skip.cold_e) for start in starts] + [(skip.cold_s, end) for end in ends]
        possible = [(start, end) for start, end in regions if start >= 0 and start + 2 <= end <= n_layers]
        if not contest.enter([skip.model_copy(update={"cold_s": s, "cold_e": e}) for s, e in possible]):
            step //= 2


def _settings(skip: Skip) -> tuple[object, ...]:
    """What makes a candidate another one: windows that skip all that is left behind a trigger are the same."""
    return skip.cold_s, skip.cold_e, min(reach(skip), skip.cold_e - skip.cold_s - 1), skip.refresh_every
