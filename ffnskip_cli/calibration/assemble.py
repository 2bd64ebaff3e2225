"""Step 6: assemble the profile from what was found and measured."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ffnskip.profile import Profile
from ffnskip.sections import (
    CalibrationText,
    Compensation,
    CurvePoint,
    EvaluationText,
    Measured,
    ModelInfo,
    SimilarityCurve,
    Skip,
)
from ffnskip_cli.benchmark.flops import ModelCost
from ffnskip_cli.benchmark.quality import Quality
from ffnskip_cli.calibration.corpus import Corpus
from ffnskip_cli.calibration.settings import Settings

# The budget of a usable profile. Beyond it the text that the model writes changes for the worse, visibly.
MAX_KL = 0.25  # nats per token
MIN_TOP1_AGREEMENT = 0.80

_DIGITS = 5  # significant; the standard errors are far larger than what is cut off
_PERCENTILES = (0.1, 0.9)


def draft(model: ModelInfo, settings: Settings, cold_s: int, cold_e: int) -> Profile:
    """A profile that has its rule settings but neither a solved threshold nor measurements yet."""
    return Profile(
        schema="ffnskip/v1",
        model=model,
        skip=Skip(
            rule="cosine",
            cold_s=cold_s,
            cold_e=cold_e,
            threshold=1.0,
            warm_up=settings.warm_up,
            window=settings.window,
            refresh_every=settings.refresh_every,
        ),
        compensation=Compensation(kind="none"),
        made_with={name: version(name).partition("+")[0] for name in ("ffnskip", "torch", "transformers")},
    )


def calibration_text(corpus: Corpus, settings: Settings, dtype: torch.dtype) -> CalibrationText:
    """What the profile says about the text that it was calibrated on."""
    return CalibrationText(
        **_text_fields(corpus), seed=settings.seed, dtype=str(dtype).removeprefix("torch."), on=settings.on
    )


def evaluation_text(corpus: Corpus) -> EvaluationText:
    """What the profile says about the text that its quality was measured on."""
    return EvaluationText(**_text_fields(corpus))


def similarity_curve(similarities: Tensor) -> SimilarityCurve:
    """Mean and band over tokens of ``similarities [tokens, n_layers]``."""
    layers = similarities.double().unbind(dim=1)  # one at a time: torch.quantile takes 2**24 numbers at most
    low, high = (tuple(_tidy(float(layer.quantile(share))) for layer in layers) for share in _PERCENTILES)
    return SimilarityCurve(mean=tuple(_tidy(float(layer.mean())) for layer in layers), low=low, high=high)


def measured(target: float, quality: Quality, cost: ModelCost, sequence_length: int) -> Measured:
    """What the profile says about its own cost, with a verdict on it."""
    within_budget, sentence = verdict(quality)
    estimates = {
        "skip_ratio": quality.skip_ratio,
        "perplexity_dense": quality.perplexity_dense,
        "perplexity": quality.perplexity,
        "kl": quality.kl,
        "top1_agreement": quality.top1_agreement,
    }
    return Measured(
        target_ratio=target,
        flops_saved=_tidy(cost.saved_share(quality.stats, quality.sequences, sequence_length)),
        never_skip_fraction=_tidy(quality.stats.never_skip_fraction),
        tokens=quality.tokens,
        verdict=sentence,
        within_budget=within_budget,
        standard_error={name: _tidy(estimate.standard_error) for name, estimate in estimates.items()},
        first_skipped=tuple(_tidy(count / quality.stats.tokens) for count in quality.stats.first_skipped),
        **{name: _tidy(estimate.mean) for name, estimate in estimates.items()},
    )


def curve_point(threshold: float, quality: Quality) -> CurvePoint:
    """A point of the curve along which the ratio can be moved."""
    return CurvePoint(threshold, _tidy(quality.skip_ratio.mean), _tidy(quality.kl.mean))


def verdict(quality: Quality) -> tuple[bool, str]:
    """Is the profile within the quality budget? And the same as a sentence."""
    broken = []
    if quality.kl.mean > MAX_KL:
        broken.append(f"KL {quality.kl.mean:.3f} is over {MAX_KL:.3f} nats per token")
    if quality.top1_agreement.mean < MIN_TOP1_AGREEMENT:
        broken.append(f"top-1 agreement {quality.top1_agreement.mean:.3f} is under {MIN_TOP1_AGREEMENT:.3f}")
    if broken:
        return False, f"over the quality budget: {' and '.join(broken)}; expect visibly worse text"
    budget = f"KL at most {MAX_KL} nats per token, top-1 agreement at least {MIN_TOP1_AGREEMENT:.2f}"
    return True, f"within the quality budget ({budget})"


def _text_fields(corpus: Corpus) -> dict[str, Any]:
    return {
        "dataset": corpus.dataset,
        "config": corpus.config,
        "split": corpus.split,
        "revision": corpus.revision,
        "text_sha256": corpus.text_sha256,
        "tokens_requested": corpus.tokens_requested,
        "tokens_used": corpus.tokens_used,
        "sequence_length": corpus.tokens.shape[1],
    }


def _tidy(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
