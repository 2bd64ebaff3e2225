"""Choose the settings of the rule `cosine` that nobody pinned, and keep the evidence for the profile.

The mean similarity curve proposes the region: cold are the layers at both ends that turn the stream most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.errors import FfnskipError
from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Skip
from ffnskip_cli.calibration import assemble
from ffnskip_cli.calibration.lab import Lab, Sizes, Step
from ffnskip_cli.calibration.recording.file import Statistics
from ffnskip_cli.calibration.recording.record import Record, sample_size
from ffnskip_cli.calibration.rules.base import (
    RuleCompiler,
    ablate,
    ablation_cost,
    possible_warm_ups,
    smallest_good,
)
from ffnskip_cli.calibration.rules.cosine.search import CORRECTIONS, SEARCH_TOKENS, Scored, Scorer, search
from ffnskip_cli.calibration.settings import DEFAULT_WARM_UP, Settings
from ffnskip_cli.calibration.threshold.goals import largest_within, limit_passes
from ffnskip_cli.calibration.threshold.solve import highest_ratio, refuse_beyond

if TYPE_CHECKING:
    from ffnskip_cli.text.corpus import Corpus

STEEP = 2.5  # a layer is steep when it turns the stream this many times as much as the median layer
MARGIN = 1  # layers beside the steep ends that stay cold too


@dataclass(frozen=True)
class Region:
    """The skip region ``[cold_s, cold_e)``."""

    cold_s: int
    cold_e: int


def find_region(mean_similarity: Tensor) -> Region:
    """Choose the skip region from the mean similarity of each layer, ``[n_layers]``.

    The paper looks for a monotone rise at the start and a monotone fall at the end, but real curves dip on the way:
    SmolLM2-135M starts at 0.06, lies between 0.95 and 0.98 with dips at layers 20 and 23, and ends at 0.74. What does
    stand out is how much more the first and last layers turn the stream, ``1 - similarity``, than the median layer
    does. So the region begins behind the last steep layer of the first half, ends before the first one of the second
    half, and keeps one layer's distance from both, because a layer beside a steep end still lies on the slope.

    Raises:
        FfnskipError: fewer than two layers remain, so that nothing could ever be skipped.
    """
    turn = 1.0 - mean_similarity
    n_layers = len(turn)
    steep = [layer for layer in range(n_layers) if turn[layer] > STEEP * turn.median()]
    middle = n_layers / 2
    cold_s = max((layer + 1 for layer in steep if layer < middle), default=0) + MARGIN
    cold_e = min((layer for layer in steep if layer >= middle), default=n_layers) - MARGIN
    if cold_e - cold_s < 2:
        raise FfnskipError(
            "The similarity curve has no plateau of at least two layers to skip in: choose the region yourself with "
            "--cold-s and --cold-e."
        )
    return Region(cold_s, cold_e)


class CosineCompiler(RuleCompiler):
    """Searches region, window and refresh, then the warm-up, then fits the compensation."""

    @property
    def searches(self) -> bool:
        """Whether there is a region, window or refresh to choose, and candidates to choose from."""
        settings = self.settings
        free = "auto" in (settings.window, settings.refresh_every) or None in (settings.cold_s, settings.cold_e)
        return free and settings.candidates > 0

    def run(self, lab: Lab, statistics: Statistics, fit_text: Corpus | None) -> tuple[Profile, Record]:
        """See `RuleCompiler`; raises FfnskipError, too, where the curve has no plateau."""
        draft = self.choose(lab, statistics)
        return self.fit.run(lab, draft, fit_text, statistics.record.sequences), statistics.record

    def choose(self, lab: Lab, statistics: Statistics) -> Profile:
        """A profile with the rule for all goals, and with what was tried, but without a threshold.

        The search compares at the largest ratio asked for, where a wrong choice costs most; the limits of other goals
        are turned into ratios first.
        """
        settings, record = self.settings, statistics.record
        settings.refuse_region(record.values.shape[2])
        draft = assemble.draft(statistics.identity.source.model, _start(record, settings))
        ablating = self.frees_warm_up(record)
        if not (self.searches or ablating):
            return draft
        ratio = _largest_ratio(lab, draft, record, settings)
        scorer = Scorer(lab, draft, record, ratio)
        scored: list[Scored] = search(scorer, draft.skip, settings) if self.searches else []
        chosen = scored[0].skip if scored else scorer.score([draft.skip])[0].skip
        trials = []
        if ablating:
            warm_ups = possible_warm_ups(record.sequences.shape[1])
            trials = ablate(lab, draft.model_copy(update={"skip": chosen}), record.sequences, warm_ups)
            chosen = chosen.model_copy(update={"warm_up": smallest_good(trials)})
        evidence = assemble.search_evidence(ratio, scorer.tokens, scored, trials)
        return draft.model_copy(update={"skip": chosen, "search": evidence})

    def cost(self, sizes: Sizes) -> list[Step]:
        """See `RuleCompiler`."""
        warm_ups = ablation_cost(self.settings, sizes)
        steps = [self._search_cost(sizes)] if self.searches or warm_ups else []
        return [*steps, *warm_ups, *self.fit.cost(sizes)]

    def _search_cost(self, sizes: Sizes) -> Step:
        """Every call compares at least one candidate with the dense model, whose pass is shared."""
        rules = self.settings.candidates if self.searches else 1
        limits = {goal.kind for goal in self.settings.goals if goal.is_limit}
        scored = min(sizes.recorded, sample_size(SEARCH_TOKENS, sizes.length))
        passes = 2 * rules * (1 + CORRECTIONS) * scored + len(limits) * limit_passes(sizes)
        return Step(f"compare up to {rules} rules" if self.searches else "solve for the warm-ups", passes)


def _start(record: Record, settings: Settings) -> Skip:
    """What is pinned, and where nothing is, the paper's rule in the region that the curve proposes.

    Where that is too small for the targets, its free ends are moved outwards.
    """
    usual = min(DEFAULT_WARM_UP, record.values.shape[1] // 4)
    tokens = usual if settings.warm_up == "auto" else settings.warm_up
    region = _region(record, tokens, settings)
    skip = Skip(
        rule="cosine",
        cold_s=region.cold_s,
        cold_e=region.cold_e,
        threshold=1.0,
        warm_up=tokens,
        window=None if settings.window == "auto" else settings.window,
        refresh_every=None if settings.refresh_every == "auto" else settings.refresh_every,
    )
    target = max((goal.value for goal in settings.goals if goal.kind == "target_ratio"), default=0.0)
    while target > highest_ratio(record, skip):
        wider = {
            "cold_s": max(0, skip.cold_s - 1) if settings.cold_s is None else skip.cold_s,
            "cold_e": min(record.values.shape[2], skip.cold_e + 1) if settings.cold_e is None else skip.cold_e,
        }
        if wider == skip.model_dump(include={"cold_s", "cold_e"}):
            break  # whoever solves for that target will say that it is out of reach
        skip = skip.model_copy(update=wider)
    return skip


def _region(record: Record, warm_up: int, settings: Settings) -> Region:
    """The region that the settings pin, or that the curve proposes."""
    cold_s, cold_e, n_layers = settings.cold_s, settings.cold_e, record.values.shape[2]
    if cold_s is None or cold_e is None:
        found = find_region(torch.stack([layer.double().mean() for layer in record.layers(warm_up)]))
        if cold_s is None:
            cold_s = found.cold_s if cold_e is None or found.cold_s < cold_e else 0
        if cold_e is None:
            cold_e = found.cold_e if cold_s < found.cold_e else n_layers
    return Region(cold_s, cold_e)


def _largest_ratio(lab: Lab, draft: Profile, record: Record, settings: Settings) -> float:
    """Of the goals that can be reached; a limit's is what the draft itself reaches within the largest one."""
    most = highest_ratio(record, draft.skip)
    largest = max(settings.goals, key=lambda goal: goal.value)
    if not largest.is_limit:
        possible = [goal.value for goal in settings.goals if goal.value <= most]
        return max(possible) if possible else refuse_beyond(record, draft.skip, largest.value)
    ratio = largest_within(lab, draft, record, largest, largest.value).ratio
    return min(ratio, most)  # a mean over sequences may be rounded up beyond it
