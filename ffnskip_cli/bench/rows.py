"""One row of a benchmark: the figures of one way to run the model, under the names that JSON has for them."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from ffnskip.stats import SkipStats
from ffnskip_cli.measure.flops import ModelCost, Overhead
from ffnskip_cli.measure.quality import Estimate, Quality
from ffnskip_cli.measure.speed import Speed
from ffnskip_cli.measure.worst_case import Continuation

PERCENTILES = (50, 99, 99.9)  # of the tokens, by their KL
_FIELDS = [
    "missing",
    "skip_ratio",
    "flops_per_token",
    "flops_saved",
    "flops_saved_past_warm_up",
    "least_skipped",
    "never_skip_fraction",
    "tokens_per_second",
    "speedup",
    "ceiling",
    "decode_skip_ratio",
    "first_token_seconds",
    "prompt_share",
    "breakdown",
    "perplexity",
    "kl",
    "kl_reverse",
    "kl_percentiles",
    "kl_by_layer",
    "top1_agreement",
    "repetition",
    "standard_error",
]


def empty_row(name: str, missing: str | None = None) -> dict[str, Any]:
    """A row of which nothing has been measured, or nothing can be, and why; this is the order of its fields."""
    return {"name": name, **dict.fromkeys(_FIELDS), "missing": missing}


def of_quality(quality: Quality | None, cost: ModelCost, added: Overhead, length: int) -> dict[str, Any]:
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


def of_dense(quality: Quality | None, cost: ModelCost, length: int) -> dict[str, Any]:
    """Of the dense model, which by definition skips nothing and agrees with itself."""
    if quality is None:
        return {}
    nothing = {"kl": 0.0, "kl_reverse": 0.0, "kl_percentiles": {f"{p:g}": 0.0 for p in PERCENTILES}}
    exact = {"skip_ratio": 0.0, "flops_saved": 0.0, "flops_saved_past_warm_up": 0.0, "top1_agreement": 1.0}
    flops = {"flops_per_token": cost.dense_flops(0, length) / length}
    return exact | nothing | flops | _with_errors({"perplexity": quality.perplexity_dense})


def of_continuation(text: Continuation | None) -> dict[str, Any]:
    """Of what was generated."""
    if text is None:
        return {}
    never = 1.0 if text.stats is None else text.stats.never_skip_fraction
    return {"never_skip_fraction": never, "repetition": text.repetition}


def of_speed(speed: Speed, dense: Speed, cost: ModelCost, added: Overhead, keys: float) -> dict[str, Any]:
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
        "first_token_seconds": median(speed.first_tokens),
        "prompt_share": median(speed.prompt_shares),
        "breakdown": speed.breakdown,
    }


def _kl_of_tokens(quality: Quality) -> dict[str, Any]:
    """Where the KL is: most tokens cost next to nothing, and few cost most."""
    if quality.kl_by_token is None:
        return {}
    kl, reverse = quality.kl_by_token
    levels = torch.tensor(PERCENTILES, dtype=kl.dtype) / 100
    percentiles = {f"{p:g}": value for p, value in zip(PERCENTILES, kl.quantile(levels).tolist(), strict=True)}
    return {"kl_percentiles": percentiles, "kl_reverse": float(reverse.mean())}


def _with_errors(estimates: dict[str, Estimate]) -> dict[str, Any]:
    means = {name: estimate.mean for name, estimate in estimates.items()}
    return {**means, "standard_error": {name: estimate.standard_error for name, estimate in estimates.items()}}
