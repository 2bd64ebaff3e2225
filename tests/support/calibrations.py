"""Whole calibrations of pico models in one call."""

from typing import Any

import torch
from support.pico import N_LAYERS, pico_source
from torch import Tensor
from transformers import PreTrainedModel

import ffnskip
from ffnskip import FfnskipError, Profile, SkipStats
from ffnskip_cli.calibration.assemble import Calibrated, Calibration
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.pipeline import Pipeline
from ffnskip_cli.calibration.recording.collect import Ranks, Share, collect, identity_of
from ffnskip_cli.calibration.recording.file import Statistics
from ffnskip_cli.calibration.settings import Goal, Settings
from ffnskip_cli.measure.quality import Quality, measure_quality
from ffnskip_cli.progress import silently
from ffnskip_cli.text.corpus import Corpus

WARM_UP = 3


def paper_settings(*goals: Goal, **choices: Any) -> Settings:
    """Settings whose rule is the paper's, without compensation, unless they say otherwise."""
    return Settings(goals, **{"rule": "cosine", "compensate": "none", **choices})


def corpus_of(tokens: Tensor, name: str = "own", requested: int | None = None) -> Corpus:
    """A corpus of these ``tokens [sequences, length]``, whose documents nobody knows."""
    size = tokens.numel() if requested is None else requested
    return Corpus(tokens, "ab" * 32, size, frozenset(), name, "en", "train", "f" * 40)


def recorded(model: PreTrainedModel, text: Tensor, settings: Settings) -> Statistics:
    """The recording of a text."""
    identity = identity_of(pico_source(model), corpus_of(text, requested=text.numel() + 7), settings)
    return collect(Lab(model), identity, text, Share(), Ranks())


def calibrated(
    model: PreTrainedModel, text: Tensor, held_out: Tensor, settings: Settings, fit_text: Tensor | None = None
) -> Calibration:
    """Record a text and compile profiles, measured on the held-out one."""
    to_fit = None if fit_text is None else corpus_of(fit_text)
    return Pipeline(settings).compile(Lab(model), recorded(model, text, settings), corpus_of(held_out, "other"), to_fit)


def calibrated_on(
    model: PreTrainedModel, text: Tensor, held_out: Tensor, *goals: Goal, **choices: Any
) -> list[Calibrated]:
    """Calibrate on all of a text without a search, unless the choices say otherwise; the first refusal is raised."""
    sizes = {"tokens": text.numel(), "sequence_length": text.shape[1], "warm_up": WARM_UP, "candidates": 0}
    result = calibrated(model, text, held_out, paper_settings(*goals, **{**sizes, **choices}))
    if result.refused:
        raise FfnskipError(result.refused[0])
    return result.finished


def quality_of(model: PreTrainedModel, profile: Profile, tokens: Tensor) -> Quality:
    (quality,) = measure_quality(model, [profile], tokens, silently)
    return quality


def ratio_by_apply(model: PreTrainedModel, profile: Profile, sequences: Tensor) -> float:
    """The skip ratio of the running model, one sequence at a time."""
    stats = SkipStats(N_LAYERS)
    for sequence in sequences:
        with ffnskip.apply(model, profile, mode="score") as applied, torch.inference_mode():
            model(sequence[None])
        stats.add(applied.stats)
    return stats.skip_ratio
