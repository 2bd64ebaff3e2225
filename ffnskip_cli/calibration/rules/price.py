"""Compile the rule `price`: its constants from a few backward passes, its values from the dense model."""

from __future__ import annotations

import torch
from torch import Tensor

from ffnskip.errors import FfnskipError, ProfileError
from ffnskip.model.parts import parts_of
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Parts
from ffnskip.profiles.weights import Weights
from ffnskip_cli.calibration import assemble
from ffnskip_cli.calibration.fit.prices import PRICE_TOKENS, record_prices, take_prices
from ffnskip_cli.calibration.fit.stage import BACKWARD
from ffnskip_cli.calibration.lab import Lab, Sizes, Step
from ffnskip_cli.calibration.recording.file import Statistics
from ffnskip_cli.calibration.recording.record import Record, sample_size
from ffnskip_cli.calibration.rules import warm_up
from ffnskip_cli.calibration.rules.base import RuleCompiler
from ffnskip_cli.calibration.threshold.solve import highest_ratio, solve_threshold
from ffnskip_cli.calibration.threshold.verify import VERIFY_TOKENS
from ffnskip_cli.text.corpus import Corpus

_FIRST = 16  # position of each sequence from which derivatives count: the first tokens are unlike all others


class PriceCompiler(RuleCompiler):
    """Takes the derivatives, then chooses the warm-up; what is recorded are the prices of the dense model's parts."""

    def run(self, lab: Lab, statistics: Statistics, fit_text: Corpus | None) -> tuple[Profile, Record]:
        """See `RuleCompiler`; raises UnsupportedModelError, too, for a model that is not made of plain matrices."""
        prices, sample = self._prices(lab, statistics.record.sequences), statistics.record.first(VERIFY_TOKENS)
        parts = Parts(**{part.role: part.width for part in parts_of(ffn_sites(lab.model)[0].layer)})
        draft = _with_prices(self.start(statistics, parts), prices)
        record = record_prices(lab, prices, sample.sequences, statistics.record.prompt_tokens)
        if self.settings.warm_up != "auto" or not warm_up.possible_warm_ups(sample.sequences.shape[1]):
            return draft, record
        ratio = min(self.fit.ratio, highest_ratio(record, draft.skip))
        trials = warm_up.ablate(lab, draft.with_threshold(solve_threshold(record, draft.skip, ratio)), sample)
        skip = draft.skip.model_copy(update={"warm_up": warm_up.smallest_good(trials)})
        return draft.model_copy(update={"skip": skip, "search": assemble.search_evidence(ratio, 0, [], trials)}), record

    def cost(self, sizes: Sizes) -> list[Step]:
        """See `RuleCompiler`."""
        return [
            Step("take gradients", BACKWARD * min(sizes.recorded, sample_size(PRICE_TOKENS, sizes.length))),
            Step("record prices", min(sizes.recorded, sample_size(VERIFY_TOKENS, sizes.length))),
            *warm_up.cost(self.settings, sizes),
        ]

    def _prices(self, lab: Lab, sequences: Tensor) -> dict[str, Tensor]:
        sample = sequences[: sample_size(PRICE_TOKENS, sequences.shape[1])]
        first, seed = min(_FIRST, sample.shape[1] // 4), self.settings.seed
        key = ["prices", sample.tolist(), first, seed]
        return lab.journal.remember_tensors(key, lambda: take_prices(lab, sample, first, seed))


def _with_prices(draft: Profile, prices: dict[str, Tensor]) -> Profile:
    """The draft with the constants of its region."""
    region = slice(draft.skip.cold_s, draft.skip.cold_e)
    try:
        return draft.with_weights(Weights({name: c[region].to(torch.bfloat16) for name, c in prices.items()}))
    except ProfileError:
        raise FfnskipError("The gradients are not finite numbers: try another --dtype, such as float32.") from None
