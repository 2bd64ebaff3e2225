"""Fit what a rule needs, and choose what the fit leaves open: region and warm-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Skip, TriedCompensation
from ffnskip.rules import may_skip
from ffnskip_cli.budget import MAX_KL
from ffnskip_cli.calibration import assemble
from ffnskip_cli.calibration.fit.auto import choose_compensation
from ffnskip_cli.calibration.fit.fit import HELD_BACK, fit_weights
from ffnskip_cli.calibration.fit.kinds import compensation_of
from ffnskip_cli.calibration.fit.loop import record_scores
from ffnskip_cli.calibration.recording.file import Statistics
from ffnskip_cli.calibration.recording.record import Record
from ffnskip_cli.calibration.rules.warm_up import ablate, possible_warm_ups, smallest_good
from ffnskip_cli.calibration.settings import DEFAULT_WARM_UP, Settings
from ffnskip_cli.calibration.threshold.solve import highest_ratio, solve_threshold
from ffnskip_cli.calibration.threshold.verify import VERIFY_TOKENS
from ffnskip_cli.journal import Journal
from ffnskip_cli.text.corpus import Corpus
from ffnskip_cli.track import Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

USUAL_RATIO = 0.25  # where the loop is closed if only limits on quality are asked for
_HARDLY_EVER = 0.002  # of the tokens: a layer at the end of the region that skips less is left alone


def compensate(
    model: PreTrainedModel,
    draft: Profile,
    text: Corpus,
    recorded: Tensor,
    settings: Settings,
    track: Track,
    journal: Journal,
) -> Profile:
    """The draft of a rule with the compensation that the settings ask for, fitted at the middle of their ratios.

    The first of the sequences `recorded`, ``[n, length]``, are what the fit proves itself on.
    """
    held_back = recorded[:HELD_BACK]
    ratio, seed = _ratio(settings), settings.seed
    tried: tuple[TriedCompensation, ...] = ()
    gradients = None
    if settings.compensate == "auto":
        budget = max((goal.value for goal in settings.goals if goal.kind == "max_kl"), default=MAX_KL)
        chosen, tried, gradients = choose_compensation(
            model, draft, text, held_back, ratio, budget, seed, track, journal
        )
    else:
        chosen = compensation_of(model, settings)
    draft = draft.model_copy(update={"compensation": chosen})
    return fit_weights(model, draft, text, held_back, ratio, seed, track, journal, tried, gradients)


def choose_damage(
    model: PreTrainedModel, statistics: Statistics, text: Corpus, settings: Settings, track: Track, journal: Journal
) -> tuple[Profile, Record]:
    """The rule `predicted-damage` for all goals, without a solved threshold, and what its probes say on the recording.

    Raises:
        FfnskipError: the region that is pinned is too small for every target.
    """
    recorded, n_layers = statistics.record.values.shape[1:]
    settings.refuse_region(n_layers)
    usual = min(DEFAULT_WARM_UP, recorded // 4)
    skip = Skip(
        rule="predicted-damage",
        cold_s=settings.cold_s or 0,
        cold_e=n_layers if settings.cold_e is None else settings.cold_e,
        threshold=0.0,
        warm_up=usual if settings.warm_up == "auto" else settings.warm_up,
        refresh_every=None if settings.refresh_every == "auto" else settings.refresh_every,
    )
    draft = assemble.draft(statistics.identity.source.model, skip)
    fitted = compensate(model, draft, text, statistics.record.sequences, settings, track, journal)
    sample, ratio = statistics.record.first(VERIFY_TOKENS), _ratio(settings)
    if settings.warm_up == "auto" and possible_warm_ups(sample.sequences.shape[1]):
        trials = ablate(model, fitted, sample, track, journal)
        chosen = fitted.skip.model_copy(update={"warm_up": smallest_good(trials)})
        evidence = assemble.search_evidence(ratio, 0, [], trials)
        fitted = fitted.model_copy(update={"skip": chosen, "search": evidence})
    record = record_scores(model, fitted, sample.sequences, statistics.record.prompt_tokens, track)
    return _without_idle_ends(fitted, record, settings), record


def _ratio(settings: Settings) -> float:
    """Where the loop is closed: in the middle of the ratios that are asked for."""
    ratios = sorted(goal.value for goal in settings.goals if goal.kind == "target_ratio")
    return ratios[len(ratios) // 2] if ratios else USUAL_RATIO


def _without_idle_ends(profile: Profile, record: Record, settings: Settings) -> Profile:
    """Leave alone layers at both ends that hardly skip even at the largest ratio: they would only pay for probes."""
    most = highest_ratio(record, profile.skip)
    largest = max((goal.value for goal in settings.goals if goal.kind == "target_ratio"), default=2 * _ratio(settings))
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
