"""A piece of the text that nothing is fitted to: where the threshold must lie, and what it costs there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Compensation
from ffnskip.profiles.weights import Weights
from ffnskip_cli.calibration.fit.loop import record_scores
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.recording.record import Record, record_text
from ffnskip_cli.calibration.threshold.solve import highest_ratio, solve_threshold

_BELOW, _ABOVE = 0.8, 1.25  # of the ratio: between the two the cost is taken to be a power of the ratio
_TINY = 1e-9


def trial(draft: Profile, tensors: dict[str, Tensor], threshold: float | None = None) -> Profile:
    """The draft with these weights.

    Args:
        draft: rule, region and kind of compensation.
        tensors: of the weights; missing ones are zeros, and without any there is no compensation.
        threshold: None for one at which nothing is ever skipped, so that the states are those of the dense model.
    """
    profile = draft.never if threshold is None else draft.with_threshold(threshold)
    if not tensors:
        profile = profile.model_copy(update={"compensation": Compensation(kind="none")})
    if not (shapes := profile.weight_shapes):
        return profile
    missing = {name: torch.zeros(shape) for name, shape in shapes.items() if name not in tensors}
    return profile.with_weights(Weights(tensors | missing))


@dataclass(frozen=True)
class Cost:
    """What a fit costs near the ratio: KL is taken to be a power of the ratio through two measured points.

    Attributes:
        threshold: that gives the ratio, by simulation.
        ratio: which.
        most: the largest ratio that the region allows.
        below, above: measured points (ratio, KL) on both sides.
    """

    threshold: float
    ratio: float
    most: float
    below: tuple[float, float]
    above: tuple[float, float]

    @property
    def kl(self) -> float:
        """Nats per token at exactly this ratio."""
        (low, low_kl), (high, high_kl) = self.below, self.above
        if not 0.0 < low < high:
            return high_kl
        return math.exp(math.log(low_kl) + self._power * math.log(self.ratio / low))

    def ratio_at(self, kl: float) -> float:
        """The ratio that costs `kl`, or the most that the region allows."""
        low, low_kl = self.below
        if self._power <= 0.0:
            return low
        return min(self.most, math.exp(math.log(low) + math.log(kl / low_kl) / self._power))

    @property
    def _power(self) -> float:
        (low, low_kl), (high, high_kl) = self.below, self.above
        return math.log(high_kl / low_kl) / math.log(high / low) if 0.0 < low < high else 0.0


class HeldBack:
    """Measures fits at one skip_ratio.

    Args:
        lab: with the dense model.
        sequences: ``[n, length]``, the piece of text.
        ratio: where to measure.
    """

    def __init__(self, lab: Lab, sequences: Tensor, ratio: float) -> None:
        self._lab, self._sequences, self._ratio = lab, sequences, ratio
        self._threshold: float | None = None  # the last one that was solved

    def ratio_within(self, kl: float, draft: Profile, tensors: dict[str, Tensor]) -> float:
        """The ratio that costs `kl` nats per token, measured anew where the first guess says."""
        usual = self._ratio
        self._ratio = self.measure(draft, tensors).ratio_at(kl)
        found = self.measure(draft, tensors).ratio_at(kl)
        self._ratio = usual
        return found

    def measure(self, draft: Profile, tensors: dict[str, Tensor]) -> Cost:
        """What the weights `tensors` of `draft` cost at the ratio."""
        record = self._record(draft, tensors)
        most = highest_ratio(record, draft.skip)
        wanted = min(self._ratio, most)
        thresholds = [
            solve_threshold(record, draft.skip, ratio) for ratio in (_BELOW * wanted, min(_ABOVE * wanted, most))
        ]
        trials = [trial(draft, tensors, threshold) for threshold in thresholds]
        qualities = self._lab.quality(trials, self._sequences, what="measuring the fit")
        below, above = ((quality.skip_ratio.mean, max(quality.kl.mean, _TINY)) for quality in qualities)
        self._threshold = solve_threshold(record, draft.skip, wanted)
        return Cost(self._threshold, wanted, most, below, above)

    def _record(self, draft: Profile, tensors: dict[str, Tensor]) -> Record:
        if draft.skip.by.reads != "input":
            return record_text(self._lab.model, self._sequences.long())
        # In the loop that skips already, as skipping changes what later probes see.
        return record_scores(self._lab, trial(draft, tensors, self._threshold), self._sequences, 0)
