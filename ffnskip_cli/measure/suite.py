"""The whole benchmark of one profile: which rows there are, and where each of their figures comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffnskip.decoder import Decoder
from ffnskip.errors import FfnskipError
from ffnskip.model.sites import input_device
from ffnskip.profiles.profile import Profile
from ffnskip.stats import SkipStats
from ffnskip_cli.measure.baselines import bare_profile, baseline_patterns, random_pattern
from ffnskip_cli.measure.flops import NO_OVERHEAD, ModelCost, Overhead, mean_keys, model_cost, overhead
from ffnskip_cli.measure.part_baselines import part_baselines
from ffnskip_cli.measure.quality import Estimate, Quality, Way, measure_quality
from ffnskip_cli.measure.speed import Speed, decoder_way, hugging_face_way, measure_speed
from ffnskip_cli.measure.worst_case import Continuation, continue_prompts
from ffnskip_cli.progress import Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("quality", "baselines", "speed", "worst-case")
_PERCENTILES = (50, 99, 99.9)  # of the tokens, by their KL
_SAMPLE = 8  # sequences that the baselines rank layers on; that they are tested on them too is in their favour


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


def run_suite(
    model: PreTrainedModel,
    decoder: Decoder,
    text: Tensor,
    plan: Plan,
    track: Track,
    *,
    timed_text: Tensor | None = None,
    original: PreTrainedModel | None = None,
) -> list[dict[str, Any]]:
    """Measure the rows `dense`, `ffnskip`, `hf-dense` and the baselines; a figure that was not measured is None.

    Args:
        model: the dense model.
        decoder: of that model, with the profile.
        text: ``[sequences, length]`` to score, and whose beginnings are the prompts.
        plan: what to measure; the part `baselines` only beside `quality`, as they skip as much as the profile does.
        track: shows progress.
        timed_text: ``[sequences, prompt + new tokens or more]`` to time decoding along; None to time the models' own
            continuations of the prompts.
        original: of a packed model, what it was packed from: its quality is what the others are compared with, and it
            is what Hugging Face's own loop runs.

    Raises:
        FfnskipError: all generated tokens would be warm-up.
    """
    profile = decoder.profile
    assert profile is not None
    if plan.parts & {"speed", "worst-case"} and plan.new_tokens <= profile.skip.warm_up + 1:
        raise FfnskipError(
            f"With a warm-up of {profile.skip.warm_up} none of {plan.new_tokens} new tokens could skip: generate more."
        )
    cost, added = model_cost(model), overhead(profile, model)
    prompts = text[:, : plan.prompt_tokens].to(input_device(model))
    # The dense one is made last: the model then lies row by row again, which is how Hugging Face's loop reads it fast.
    decoders = {"ffnskip": decoder, "dense": Decoder(model)}
    qualities: dict[str, Quality] = {}
    texts: dict[str, Continuation] = {}
    timed: dict[str, dict[str, Any]] = {}
    if "quality" in plan.parts:
        measured = {"ffnskip": profile} if original is None else {"dense": profile.never, "ffnskip": profile}
        scores = measure_quality(model, list(measured.values()), text, track, reference=original, by_token=True)
        qualities = dict(zip(measured, scores, strict=True))
    if "worst-case" in plan.parts:
        chosen = prompts[: plan.prompts]
        texts = {name: continue_prompts(one, chosen, plan.new_tokens, track) for name, one in decoders.items()}
    if "speed" in plan.parts:
        speeds = _speeds(decoders, original or model, prompts, timed_text, plan, track)
        keys = mean_keys(plan.prompt_tokens + profile.skip.warm_up, plan.new_tokens - profile.skip.warm_up)
        timed = {name: _timed(speed, speeds["dense"], cost, added, keys) for name, speed in speeds.items()}
    quality, length = qualities.get("ffnskip"), text.shape[1]
    dense_quality = _dense_quality(quality, cost, length) | _quality(qualities.get("dense"), cost, NO_OVERHEAD, length)
    by_row = {"dense": dense_quality, "ffnskip": _quality(quality, cost, added, length)}
    rows = [_row(row) | by_row[row] | _generated(texts.get(row)) | timed.get(row, {}) for row in by_row]
    if "hf-dense" in timed:
        rows.append(_row("hf-dense") | timed["hf-dense"])
    if quality is not None and "baselines" in plan.parts:
        rows += _baselines(model, profile, by_row["ffnskip"], text, track, original)
    return rows


def _speeds(
    decoders: dict[str, Decoder],
    users_model: PreTrainedModel,
    prompts: Tensor,
    text: Tensor | None,
    plan: Plan,
    track: Track,
) -> dict[str, Speed]:
    """Of the decoders and of Hugging Face's loop, along the text if there is one."""
    profile = decoders["ffnskip"].profile
    assert profile is not None
    warm_up, forced = profile.skip.warm_up, None
    ways = {name: decoder_way(decoders[name], warm_up) for name in ("dense", "ffnskip")}
    ways["hf-dense"] = hugging_face_way(users_model, warm_up)
    if text is not None:
        text = text.to(prompts.device)
        prompts, forced = text[:, : plan.prompt_tokens], text[:, plan.prompt_tokens :]
    return measure_speed(ways, prompts, plan.new_tokens, plan.repetitions, warm_up, track, forced)


def _baselines(
    model: PreTrainedModel,
    profile: Profile,
    own: dict[str, Any],
    text: Tensor,
    track: Track,
    original: PreTrainedModel | None,
) -> list[dict[str, Any]]:
    """Rows of what else could skip that share of the FFNs, or leave out as many FLOPs in parts, on the same text."""
    sample, cost, ratio = text[:_SAMPLE], model_cost(model), own["skip_ratio"]
    ways: dict[str, Way]
    if profile.skip.by.leaves_out_parts:
        saved = max(own["flops_saved_past_warm_up"], 0.0)
        ratio = min(saved / cost.ffn_share(profile.skip.warm_up, text.shape[1]), 1.0)
        bare = bare_profile(profile, ratio)
        ways = {**part_baselines(model, profile, saved, sample, track), "random": random_pattern(bare, ratio)}
    else:
        bare = bare_profile(profile, ratio)
        ways = {**baseline_patterns(model, bare, ratio, sample, track)}
    qualities = measure_quality(
        model,
        [bare] * len(ways),
        text,
        track,
        what="measuring baselines",
        ways=list(ways.values()),
        reference=original,
        by_token=True,
    )
    added = overhead(bare, model)
    return [
        _row(name) | _quality(quality, cost, added, text.shape[1])
        for name, quality in zip(ways, qualities, strict=True)
    ]


def _row(name: str) -> dict[str, Any]:
    """A row of which nothing has been measured yet; this is the order of its fields."""
    fields = (
        "skip_ratio flops_per_token flops_saved flops_saved_past_warm_up least_skipped never_skip_fraction "
        "tokens_per_second speedup ceiling decode_skip_ratio breakdown perplexity kl kl_reverse kl_percentiles "
        "top1_agreement repetition standard_error"
    )
    return {"name": name, **dict.fromkeys(fields.split())}


def _quality(quality: Quality | None, cost: ModelCost, added: Overhead, length: int) -> dict[str, Any]:
    """Of what skips, on the scored text, each sequence taken as one decode without a prompt."""
    if quality is None:
        return {}
    saved = cost.saved_share(quality.stats, added, quality.sequences, length)
    estimates = {
        "skip_ratio": quality.skip_ratio,
        "perplexity": quality.perplexity,
        "kl": quality.kl,
        "top1_agreement": quality.top1_agreement,
    }
    return {
        "flops_per_token": cost.dense_flops(0, length) / length * (1 - saved),
        "flops_saved": saved,
        "flops_saved_past_warm_up": cost.saved_share_past(quality.stats, added, quality.sequences, length),
        **_kl_of_tokens(quality),
        "least_skipped": quality.stats.least if any(quality.stats.left_out) else None,
        **_with_errors(estimates),
    }


def _kl_of_tokens(quality: Quality) -> dict[str, Any]:
    """Where the KL is: most tokens cost next to nothing, and few cost most."""
    if quality.kl_by_token is None:
        return {}
    kl, reverse = quality.kl_by_token
    levels = torch.tensor(_PERCENTILES, dtype=kl.dtype) / 100
    percentiles = {f"{p:g}": value for p, value in zip(_PERCENTILES, kl.quantile(levels).tolist(), strict=True)}
    return {"kl_percentiles": percentiles, "kl_reverse": float(reverse.mean())}


def _dense_quality(quality: Quality | None, cost: ModelCost, length: int) -> dict[str, Any]:
    """Of the dense model, which by definition skips nothing and agrees with itself."""
    if quality is None:
        return {}
    nothing = {"kl": 0.0, "kl_reverse": 0.0, "kl_percentiles": {f"{p:g}": 0.0 for p in _PERCENTILES}}
    exact = {"skip_ratio": 0.0, "flops_saved": 0.0, "flops_saved_past_warm_up": 0.0, "top1_agreement": 1.0}
    flops = {"flops_per_token": cost.dense_flops(0, length) / length}
    return exact | nothing | flops | _with_errors({"perplexity": quality.perplexity_dense})


def _with_errors(estimates: dict[str, Estimate]) -> dict[str, Any]:
    means = {name: estimate.mean for name, estimate in estimates.items()}
    return {**means, "standard_error": {name: estimate.standard_error for name, estimate in estimates.items()}}


def _generated(text: Continuation | None) -> dict[str, Any]:
    if text is None:
        return {}
    never = 1.0 if text.stats is None else text.stats.never_skip_fraction
    return {"never_skip_fraction": never, "repetition": text.repetition}


def _timed(speed: Speed, dense: Speed, cost: ModelCost, added: Overhead, keys: float) -> dict[str, Any]:
    """Speed, and what the same decodes skipped: the ceiling belongs to the very runs that were timed."""
    stats = speed.total_stats or SkipStats(cost.n_layers)
    return {
        "tokens_per_second": {
            "median": speed.median,
            "min": min(speed.samples),
            "max": max(speed.samples),
            "samples": speed.samples,
        },
        "speedup": speed.speedup_over(dense),
        "ceiling": cost.ceiling(stats, added, keys),
        "decode_skip_ratio": stats.skip_ratio,
        "breakdown": speed.breakdown,
    }
