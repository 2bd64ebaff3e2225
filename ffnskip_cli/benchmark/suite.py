"""The whole benchmark of one profile: which rows there are, and where each of their figures comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ffnskip.errors import FfnskipError
from ffnskip.layers import input_device
from ffnskip.profile import Profile
from ffnskip.stats import SkipStats
from ffnskip_cli.benchmark.flops import ModelCost, model_cost
from ffnskip_cli.benchmark.quality import Estimate, Quality, measure_quality
from ffnskip_cli.benchmark.speed import Speed, dense_way, hugging_face_way, measure_speed, profile_way
from ffnskip_cli.benchmark.worst_case import Continuation, continue_prompts
from ffnskip_cli.track import Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("quality", "speed", "worst-case")


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        parts: some of `PARTS`.
        prompt_tokens, new_tokens: lengths of the decodes that are timed and checked for the worst case.
        repetitions: timed runs per row.
        prompts: how many continuations the worst case is taken over.
    """

    parts: frozenset[str]
    prompt_tokens: int
    new_tokens: int
    repetitions: int
    prompts: int


def run_suite(model: PreTrainedModel, profile: Profile, text: Tensor, plan: Plan, track: Track) -> list[dict[str, Any]]:
    """Measure the rows `dense`, `ffnskip` and `hf-dense`; a figure that was not measured is None.

    Args:
        model: the dense model.
        profile: its profile.
        text: ``[sequences, length]`` to score, and whose beginnings are the prompts.
        plan: what to measure.
        track: shows progress.

    Raises:
        FfnskipError: all generated tokens would be warm-up.
    """
    if plan.parts & {"speed", "worst-case"} and plan.new_tokens <= profile.skip.warm_up + 1:
        raise FfnskipError(
            f"With a warm-up of {profile.skip.warm_up} none of {plan.new_tokens} new tokens could skip: generate more."
        )
    cost = model_cost(model)
    prompts = text[:, : plan.prompt_tokens].to(input_device(model))
    quality = speeds = dense_text = skip_text = None
    if "quality" in plan.parts:
        (quality,) = measure_quality(model, [profile], text, track)
    if "worst-case" in plan.parts:
        dense_text = continue_prompts(model, None, prompts[: plan.prompts], plan.new_tokens, track)
        skip_text = continue_prompts(model, profile, prompts[: plan.prompts], plan.new_tokens, track)
    if "speed" in plan.parts:
        ways = {"dense": dense_way(model), "ffnskip": profile_way(model, profile), "hf-dense": hugging_face_way(model)}
        speeds = measure_speed(ways, prompts, plan.new_tokens, plan.repetitions, profile.skip.warm_up, track)
    length = text.shape[1]
    rows = [
        _row("dense") | _dense_quality(quality, cost, length) | _generated(dense_text) | _timed(speeds, "dense", cost),
        _row("ffnskip") | _quality(quality, cost, length) | _generated(skip_text) | _timed(speeds, "ffnskip", cost),
    ]
    if speeds is not None:
        rows.append(_row("hf-dense") | _timed(speeds, "hf-dense", cost))
    return rows


def _row(name: str) -> dict[str, Any]:
    """A row of which nothing has been measured yet; this is the order of its fields."""
    fields = (
        "skip_ratio flops_per_token flops_saved never_skip_fraction tokens_per_second speedup ceiling "
        "decode_skip_ratio perplexity kl top1_agreement repetition standard_error"
    )
    return {"name": name, **dict.fromkeys(fields.split())}


def _quality(quality: Quality | None, cost: ModelCost, length: int) -> dict[str, Any]:
    """Of the profile, on the scored text, each sequence taken as one decode without a prompt."""
    if quality is None:
        return {}
    saved = cost.saved_share(quality.stats, quality.sequences, length)
    estimates = {
        "skip_ratio": quality.skip_ratio,
        "perplexity": quality.perplexity,
        "kl": quality.kl,
        "top1_agreement": quality.top1_agreement,
    }
    return {
        "flops_per_token": cost.dense_flops(0, length) / length * (1 - saved),
        "flops_saved": saved,
        **_with_errors(estimates),
    }


def _dense_quality(quality: Quality | None, cost: ModelCost, length: int) -> dict[str, Any]:
    """Of the dense model, which by definition skips nothing and agrees with itself."""
    if quality is None:
        return {}
    exact = {"skip_ratio": 0.0, "flops_saved": 0.0, "kl": 0.0, "top1_agreement": 1.0}
    flops = {"flops_per_token": cost.dense_flops(0, length) / length}
    return exact | flops | _with_errors({"perplexity": quality.perplexity_dense})


def _with_errors(estimates: dict[str, Estimate]) -> dict[str, Any]:
    means = {name: estimate.mean for name, estimate in estimates.items()}
    return {**means, "standard_error": {name: estimate.standard_error for name, estimate in estimates.items()}}


def _generated(text: Continuation | None) -> dict[str, Any]:
    if text is None:
        return {}
    never = 1.0 if text.stats is None else text.stats.never_skip_fraction
    return {"never_skip_fraction": never, "repetition": text.repetition}


def _timed(speeds: dict[str, Speed] | None, name: str, cost: ModelCost) -> dict[str, Any]:
    """Speed, and what the same decodes skipped: the ceiling belongs to the very runs that were timed."""
    if speeds is None:
        return {}
    speed = speeds[name]
    stats = speed.total_stats or SkipStats(cost.n_layers)
    return {
        "tokens_per_second": {
            "median": speed.median,
            "min": min(speed.samples),
            "max": max(speed.samples),
            "samples": speed.samples,
        },
        "speedup": speed.speedup_over(speeds["dense"]),
        "ceiling": cost.ceiling(stats),
        "decode_skip_ratio": stats.skip_ratio,
    }
