"""Choose the settings of the rule `cosine` that nobody pinned, and keep the evidence for the profile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Skip
from ffnskip_cli.calibration import assemble
from ffnskip_cli.calibration.recording.file import Statistics
from ffnskip_cli.calibration.recording.record import Record
from ffnskip_cli.calibration.rules.cosine.regions import Region, find_region
from ffnskip_cli.calibration.rules.cosine.search import Scored, Scorer, search
from ffnskip_cli.calibration.rules.warm_up import ablate, possible_warm_ups, smallest_good
from ffnskip_cli.calibration.settings import DEFAULT_WARM_UP, Settings
from ffnskip_cli.calibration.threshold.limit import largest_within
from ffnskip_cli.calibration.threshold.solve import highest_ratio, refuse_beyond
from ffnskip_cli.journal import Journal
from ffnskip_cli.track import Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def choose_cosine(
    model: PreTrainedModel, statistics: Statistics, settings: Settings, track: Track, journal: Journal
) -> Profile:
    """A profile with the rule for all goals, and with what was tried, but without a threshold.

    The search compares at the largest ratio asked for, where a wrong choice costs most; the limits of other goals are
    turned into ratios first.

    Raises:
        FfnskipError: the curve has no plateau, or the region is too small for a target.
    """
    record = statistics.record
    settings.refuse_region(record.values.shape[2])
    draft = assemble.draft(statistics.identity.source.model, _start(record, settings))
    searching = settings.searches
    ablating = settings.warm_up == "auto" and len(possible_warm_ups(record.sequences.shape[1])) > 0
    if not (searching or ablating):
        return draft
    ratio = _largest_ratio(model, draft, record, settings, track, journal)
    scorer = Scorer(model, draft, record, ratio, track, journal)
    scored: list[Scored] = search(scorer, draft.skip, settings) if searching else []
    chosen = scored[0].skip if searching else scorer.score([draft.skip])[0].skip
    trials = []
    if ablating:
        trials = ablate(model, draft.model_copy(update={"skip": chosen}), record, track, journal)
        chosen = chosen.model_copy(update={"warm_up": smallest_good(trials)})
    evidence = assemble.search_evidence(ratio, scorer.tokens, scored, trials)
    return draft.model_copy(update={"skip": chosen, "search": evidence})


def _start(record: Record, settings: Settings) -> Skip:
    """What is pinned, and where nothing is, the paper's rule in the region that the curve proposes.

    Where that is too small for the targets, its free ends are moved outwards.
    """
    usual = min(DEFAULT_WARM_UP, record.values.shape[1] // 4)
    warm_up = usual if settings.warm_up == "auto" else settings.warm_up
    region = _region(record, warm_up, settings)
    skip = Skip(
        rule="cosine",
        cold_s=region.cold_s,
        cold_e=region.cold_e,
        threshold=1.0,
        warm_up=warm_up,
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


def _largest_ratio(
    model: PreTrainedModel, draft: Profile, record: Record, settings: Settings, track: Track, journal: Journal
) -> float:
    """Of the goals that can be reached; a limit's is what the draft itself reaches within the largest one."""
    most = highest_ratio(record, draft.skip)
    largest = max(settings.goals, key=lambda goal: goal.value)
    if largest.kind == "target_ratio":
        possible = [goal.value for goal in settings.goals if goal.value <= most]
        return max(possible) if possible else refuse_beyond(record, draft.skip, largest.value)
    ratio = largest_within(model, draft, record, largest, largest.value, track, journal).ratio
    return min(ratio, most)  # a mean over sequences may be rounded up beyond it
