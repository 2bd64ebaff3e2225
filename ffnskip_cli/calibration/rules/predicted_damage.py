"""Choose what the rule `predicted-damage` leaves open: fit it, then its warm-up and region."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ffnskip.profiles.profile import Profile
from ffnskip.rules import may_skip
from ffnskip_cli.calibration.fit.trial import record_scores
from ffnskip_cli.calibration.lab import Lab, Sizes, Step
from ffnskip_cli.calibration.recording.file import Statistics
from ffnskip_cli.calibration.recording.record import Record, sample_size
from ffnskip_cli.calibration.rules.base import RuleCompiler, ablation_cost
from ffnskip_cli.calibration.settings import Settings
from ffnskip_cli.calibration.threshold.solve import VERIFY_TOKENS, highest_ratio, solve_threshold

if TYPE_CHECKING:
    from ffnskip_cli.text.corpus import Corpus

_HARDLY_EVER = 0.002  # of the tokens: a layer at the end of the region that skips less is left alone


class PredictedDamageCompiler(RuleCompiler):
    """Fits compensation and probes, then chooses the warm-up; the values are what the probes say when it skips."""

    def run(self, lab: Lab, statistics: Statistics, fit_text: Corpus | None) -> tuple[Profile, Record]:
        """See `RuleCompiler`."""
        fitted = self.fit.run(lab, self.start(statistics), fit_text, statistics.record.sequences)
        sample = statistics.record.first(VERIFY_TOKENS)
        fitted = self.with_warm_up(lab, fitted, sample, self.fit.ratio)
        record = record_scores(lab, fitted, sample.sequences, statistics.record.prompt_tokens)
        return _without_idle_ends(fitted, record, self.settings, self.fit.ratio), record

    def cost(self, sizes: Sizes) -> list[Step]:
        """See `RuleCompiler`."""
        recording = Step("record predicted damages", min(sizes.recorded, sample_size(VERIFY_TOKENS, sizes.length)))
        return [*self.fit.cost(sizes), *ablation_cost(self.settings, sizes), recording]


def _without_idle_ends(profile: Profile, record: Record, settings: Settings, usual: float) -> Profile:
    """Leave alone layers at both ends that hardly skip even at the largest ratio: they would only pay for probes."""
    most = highest_ratio(record, profile.skip)
    largest = max((goal.value for goal in settings.goals if goal.kind == "target_ratio"), default=2 * usual)
    skip = profile.skip.model_copy(update={"threshold": solve_threshold(record, profile.skip, min(largest, most))})
    allowed = may_skip(torch.arange(skip.warm_up, record.values.shape[1]), skip)
    shares = sum(
        skip.by.simulate(values.flatten(0, 1), allowed.repeat(len(values)), skip).double().sum(dim=0)
        for values in record.chunks(skip.warm_up)
    )
    assert isinstance(shares, torch.Tensor)
    if not shares.any():
        return profile
    busy = (shares > _HARDLY_EVER * shares.max()).nonzero().squeeze(1).tolist()
    cold_s = profile.skip.cold_s if settings.cold_s is not None else busy[0]
    cold_e = profile.skip.cold_e if settings.cold_e is not None else busy[-1] + 1
    return profile.with_region(cold_s, cold_e)
