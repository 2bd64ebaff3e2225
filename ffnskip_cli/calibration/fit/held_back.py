"""A piece of the text that nothing is fitted to: where the threshold must lie, and what it costs there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.compensation import Weights
from ffnskip.profile import Profile
from ffnskip.sections import Compensation
from ffnskip_cli.benchmark.quality import measure_quality
from ffnskip_cli.calibration.fit.loop import record_scores
from ffnskip_cli.calibration.record import Record, record_text
from ffnskip_cli.calibration.solve import highest_ratio, solve_threshold
from ffnskip_cli.journal import Journal
from ffnskip_cli.track import Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BELOW, _ABOVE = 0.8, 1.25  # of the ratio: between the two the cost is taken to be a power of the ratio
_NEVER = {"cosine": 2.0, "predicted-damage": 0.0}
_TINY = 1e-9


def trial(draft: Profile, tensors: dict[str, Tensor], threshold: float | None = None) -> Profile:
    """The draft with these weights.

    Args:
        draft: rule, region and kind of compensation.
        tensors: of the weights; missing ones are zeros, and without any there is no compensation.
        threshold: None for one at which nothing is ever skipped, so that the states are those of the dense model.
    """
    profile = draft.with_threshold(_NEVER[draft.skip.rule] if threshold is None else threshold)
    if not tensors:
        profile = profile.model_copy(update={"compensation": Compensation(kind="none")})
    if not (shapes := profile.weight_shapes):
        return profile
    missing = {name: torch.zeros(shape) for name, shape in shapes.items() if name not in tensors}
    return profile.with_weights(Weights(tensors | missing))


class HeldBack:
    """Measures fits at one skip_ratio.

    Args:
        model: the dense model.
        draft: rule, region and kind of compensation.
        sequences: ``[n, length]``, the piece of text.
        ratio: where to measure.
        track: shows progress.
        journal: remembers what was measured.
    """

    def __init__(
        self, model: PreTrainedModel, draft: Profile, sequences: Tensor, ratio: float, track: Track, journal: Journal
    ) -> None:
        self._model, self._draft, self._sequences = model, draft, sequences
        self._ratio, self._track, self._journal = ratio, track, journal
        self._threshold: float | None = None  # the last one that was solved

    def solve(self, tensors: dict[str, Tensor]) -> tuple[float, float]:
        """The threshold that gives the ratio, by simulation, and the KL that a ratio of exactly this would cost."""
        record = self._record(tensors)
        most = highest_ratio(record, self._draft.skip)
        wanted = min(self._ratio, most)
        thresholds = [
            solve_threshold(record, self._draft.skip, ratio) for ratio in (_BELOW * wanted, min(_ABOVE * wanted, most))
        ]
        profiles = [trial(self._draft, tensors, threshold) for threshold in thresholds]
        below, above = (
            (quality.skip_ratio.mean, max(quality.kl.mean, _TINY))
            for quality in measure_quality(
                self._model, profiles, self._sequences, self._track, what="measuring the fit", journal=self._journal
            )
        )
        self._threshold = solve_threshold(record, self._draft.skip, wanted)
        return self._threshold, _power_law(below, above, wanted)

    def _record(self, tensors: dict[str, Tensor]) -> Record:
        if self._draft.skip.rule == "cosine":
            return record_text(self._model, self._sequences.long())
        # In the loop that skips already, as skipping changes what later probes see.
        profile = trial(self._draft, tensors, self._threshold)
        return record_scores(self._model, profile, self._sequences, 0, self._track)


def _power_law(below: tuple[float, float], above: tuple[float, float], ratio: float) -> float:
    """KL at `ratio` from two measured points of (ratio, KL)."""
    (low, low_kl), (high, high_kl) = below, above
    if not 0.0 < low < high:
        return high_kl
    share = math.log(ratio / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(low_kl) + share * math.log(high_kl))
