"""Assemble the profile from what was found and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ffnskip.profiles.evidence import (
    CalibrationText,
    Candidate,
    CurvePoint,
    EvaluationText,
    Measured,
    Search,
    SimilarityCurve,
    WarmUpTrial,
)
from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Compensation, ModelInfo, Parts, Skip
from ffnskip_cli.budget import MAX_KL, MIN_TOP1_AGREEMENT
from ffnskip_cli.calibration.recording.record import Record
from ffnskip_cli.calibration.settings import Goal, Settings
from ffnskip_cli.measure.flops import ModelCost, Overhead, model_cost, overhead
from ffnskip_cli.measure.quality import Quality

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnskip_cli.calibration.recording.file import Statistics
    from ffnskip_cli.calibration.rules.cosine.search import Scored
    from ffnskip_cli.calibration.threshold.goals import HeldOut, Solved
    from ffnskip_cli.text.corpus import Corpus

_DIGITS = 5  # significant; the standard errors are far larger than what is cut off
_PERCENTILES = (0.1, 0.9)


def draft(model: ModelInfo, skip: Skip, parts: Parts | None = None) -> Profile:
    """A profile that has a rule but neither a solved threshold nor measurements yet."""
    return Profile(
        schema="ffnskip/v1",
        model=model,
        skip=skip,
        compensation=Compensation(kind="none"),
        parts=parts,
        made_with={name: version(name).partition("+")[0] for name in ("ffnskip", "torch", "transformers")},
    )


@dataclass(frozen=True)
class Calibrated:
    """A finished profile, what it was made for, and the ratio that was verified on the calibration text."""

    goal: Goal
    profile: Profile
    calibration_ratio: float


@dataclass(frozen=True)
class Calibration:
    """What came of the goals: the profiles of those that were reached, and a sentence for each that was not."""

    finished: list[Calibrated]
    refused: list[str]


def assemble(model: PreTrainedModel, solved: Solved, held_out: HeldOut) -> Calibration:
    """One profile for each goal that was reached; they differ in the threshold and in what is said of it."""
    qualities = held_out.qualities
    curve = tuple(
        curve_point(threshold, qualities[threshold])
        for threshold in sorted(qualities, key=lambda threshold: qualities[threshold].skip_ratio.mean)
    )
    cost, added, length = model_cost(model), overhead(held_out.draft, model), held_out.tokens.shape[1]
    finished = []
    for goal, solution in solved.reached.items():
        found = measured(goal, qualities[solution.threshold], cost, added, length)
        profile = held_out.draft.with_threshold(solution.threshold)
        profile = profile.model_copy(update={"curve": curve, "measured": found})
        finished.append(Calibrated(goal, profile, solution.ratio))
    return Calibration(finished, solved.refused)


def describe(draft: Profile, statistics: Statistics, held_out: Corpus) -> Profile:
    """The draft with what it was calibrated and will be measured on."""
    return draft.model_copy(
        update={
            "calibration": statistics.identity.text,
            "evaluation": evaluation_text(held_out),
            "similarity": similarity_curve(statistics.record, draft.skip.warm_up),
        }
    )


def calibration_text(corpus: Corpus, settings: Settings, dtype: str) -> CalibrationText:
    """What the profile says about the text that it was calibrated on."""
    return CalibrationText(**_text_fields(corpus), seed=settings.seed, dtype=dtype, on=settings.on)


def evaluation_text(corpus: Corpus) -> EvaluationText:
    """What the profile says about the text that its quality was measured on."""
    return EvaluationText(**_text_fields(corpus))


def similarity_curve(record: Record, warm_up: int) -> SimilarityCurve:
    """Mean and band over the recorded tokens past `warm_up`."""
    mean: list[float] = []
    low: list[float] = []
    high: list[float] = []
    for layer in record.layers(warm_up):
        mean.append(_tidy(float(layer.double().mean())))
        for values, share in zip((low, high), _PERCENTILES, strict=True):
            rank = 1 + round(share * (len(layer) - 1))  # torch.quantile takes 2**24 numbers at most
            values.append(_tidy(float(layer.kthvalue(rank).values)))
    return SimilarityCurve(mean=tuple(mean), low=tuple(low), high=tuple(high))


def search_evidence(ratio: float, tokens: int, scored: Sequence[Scored], trials: Sequence[WarmUpTrial]) -> Search:
    """What the profile says about how its rule was chosen; of `scored` the first is the chosen one."""
    candidates = []
    for candidate in scored:
        _, error = candidate.lead_over(scored[0])
        candidates.append(
            Candidate(
                **candidate.skip.model_dump(include={"cold_s", "cold_e", "window", "refresh_every"}),
                kl=_tidy(float(candidate.kl.mean())),
                standard_error=_tidy(error),
            )
        )
    warm_up = [
        trial.model_copy(update={name: _tidy(getattr(trial, name)) for name in ("kl", "standard_error", "repetition")})
        for trial in trials
    ]
    return Search(ratio=_tidy(ratio), tokens=tokens, candidates=tuple(candidates), warm_up=tuple(warm_up))


def measured(goal: Goal, quality: Quality, cost: ModelCost, added: Overhead, sequence_length: int) -> Measured:
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
        **{goal.kind: goal.value},
        flops_saved=_tidy(cost.saved_share(quality.stats, added, quality.sequences, sequence_length)),
        flops_saved_past_warm_up=_tidy(cost.saved_share_past(quality.stats, added, quality.sequences, sequence_length)),
        least_skipped=_tidy(quality.stats.least) if any(quality.stats.left_out) else None,
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
        broken.append(f"KL {quality.kl.mean:.4f} is over {MAX_KL} nats per token")
    if quality.top1_agreement.mean < MIN_TOP1_AGREEMENT:
        broken.append(f"top-1 agreement {quality.top1_agreement.mean:.4f} is under {MIN_TOP1_AGREEMENT:.2f}")
    if broken:
        return False, f"over the quality budget: {' and '.join(broken)}"
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
        "parts": corpus.parts,
    }


def _tidy(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
