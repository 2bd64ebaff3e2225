"""One profile at several savings: the paper's Table 4. Nothing is calibrated anew, only the threshold moves."""

from __future__ import annotations

from torch import Tensor

from ffnskip.errors import FfnskipError
from ffnskip.profiles.profile import Profile
from ffnskip.stats import SkipStats
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.threshold.solve import count_skips
from ffnskip_cli.measure.flops import model_cost, overhead

_GOOD_ENOUGH = 0.002  # of all FLOPs past warm-up: where looking stops
_PROMISED = 0.01


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
            FfnskipError: no threshold does, within 0.01.
        """
        rule = self._profile.skip.by
        loose, strict = rule.steps[0], rule.steps[-1]
        if (most := self._saved(loose)) < saved:
            raise FfnskipError(f"A saving of {saved:g} is out of reach: the profile saves at most {most:.3f}.")
        loose = max((step for step, value in self._known.items() if value >= saved), default=loose)
        strict = min((step for step, value in self._known.items() if value < saved), default=strict)
        best = loose
        while strict - loose > 1 and abs(self._saved(best) - saved) > _GOOD_ENOUGH:
            middle = (loose + strict) // 2
            loose, strict = (middle, strict) if self._saved(middle) >= saved else (loose, middle)
            best = min(self._known, key=lambda step: abs(self._known[step] - saved))
        if abs(self._saved(best) - saved) > _PROMISED:
            raise FfnskipError(f"A saving of {saved:g} is out of reach: the nearest is {self._saved(best):.3f}.")
        return self._profile.with_threshold(rule.threshold_at(best))

    def _saved(self, step: int) -> float:
        if step not in self._known:
            threshold = self._profile.skip.by.threshold_at(step)
            profile, total = self._profile.with_threshold(threshold), SkipStats(self._profile.model.n_layers)
            for sequence in self._lab.track(self._sample, f"trying threshold {threshold:g}", len(self._sample)):
                total.add(SkipStats(**count_skips(self._lab.model, profile, sequence)))
            self._known[step] = self._cost.saved_share_past(total, self._added, *self._sample.shape)
        return self._known[step]
