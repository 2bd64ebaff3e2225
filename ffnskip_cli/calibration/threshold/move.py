"""Move a profile to savings in the running model: nothing is calibrated anew, only the threshold moves."""

from __future__ import annotations

from torch import Tensor

from ffnskip.errors import FfnskipError
from ffnskip.profiles.profile import Profile
from ffnskip.stats import SkipStats
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.threshold.solve import count_skips
from ffnskip_cli.measure.flops import model_cost, overhead

_GOOD_ENOUGH = 0.01  # of the saving: where looking stops
_NOT_LESS_THAN = 0.0005  # of all FLOPs past warm-up
_PROMISED = 0.01  # of all FLOPs past warm-up: how far off a saving may be


class Mover:
    """Moves a profile to savings, each by bisection; what was measured for one serves the next.

    Args:
        lab: with the dense model.
        profile: complete with its weights.
        sample: ``[sequences, length]``, text on which savings are measured, in score mode.
    """

    def __init__(self, lab: Lab, profile: Profile, sample: Tensor) -> None:
        self._lab, self._profile, self._sample = lab, profile, sample
        self._cost, self._added = model_cost(lab.model), overhead(profile, lab.model)
        self._known: dict[int, float] = {}  # savings by the rule's steps, the most first

    def saving(self, saved: float) -> Profile:
        """The profile with the threshold that saves this share of all FLOPs past warm-up.

        Raises:
            FfnskipError: no threshold does, within 0.01; a clause whose subject is the profile.
        """
        rule = self._profile.skip.by
        loose, strict = rule.steps[0], rule.steps[-1]
        if (most := self._saved(loose)) + _PROMISED < saved:
            raise FfnskipError(f"it saves at most {most:.3f} of the FLOPs")
        loose = max((step for step, value in self._known.items() if value >= saved), default=loose)
        strict = min((step for step, value in self._known.items() if value < saved), default=strict)
        good_enough = max(_NOT_LESS_THAN, _GOOD_ENOUGH * saved)
        while strict - loose > 1 and abs(self._known[self._nearest(saved)] - saved) > good_enough:
            middle = (loose + strict) // 2
            loose, strict = (middle, strict) if self._saved(middle) >= saved else (loose, middle)
        best = self._nearest(saved)
        if abs(self._known[best] - saved) > _PROMISED:
            raise FfnskipError(f"the nearest that it can save is {self._known[best]:.3f}")
        return self._profile.with_threshold(rule.threshold_at(best))

    def _nearest(self, saved: float) -> int:
        return min(self._known, key=lambda step: abs(self._known[step] - saved))

    def _saved(self, step: int) -> float:
        if step not in self._known:
            threshold = self._profile.skip.by.threshold_at(step)
            profile, total = self._profile.with_threshold(threshold), SkipStats(self._profile.model.n_layers)
            for sequence in self._lab.track(self._sample, f"trying threshold {threshold:g}", len(self._sample)):
                total.add(SkipStats(**count_skips(self._lab.model, profile, sequence)))
            self._known[step] = self._cost.saved_share_past(total, self._added, *self._sample.shape)
        return self._known[step]
