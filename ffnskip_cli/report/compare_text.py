"""A comparison of calibration texts as two matrices, lines and JSON, and the answer in words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import TYPE_CHECKING, Any, Literal

from ffnskip_cli.budget import NOISE
from ffnskip_cli.report.tables import Column, print_json, print_sentence, render

if TYPE_CHECKING:
    from ffnskip_cli.calibration.compare import Comparison
    from ffnskip_cli.measure.quality import Estimate, Quality

_FIGURES = ("skip_ratio", "kl", "perplexity_dense", "perplexity", "top1_agreement")
_TITLES = {
    "skip_ratio": "Skip ratio, calibrated on (rows) and measured on (columns)",
    "kl": "KL in nats per token, likewise",
}
_PROFILES = [
    Column("calibrated_on", "calibrated on"),
    Column("region", "skip region"),
    Column("window", "window", "d"),
    Column("refresh_every", "refresh every", "d"),
    Column("warm_up", "warm-up", "d"),
    Column("threshold", "threshold", ".6f"),
    Column("calibration_ratio", "ratio (calibration)", ".3f"),
]
_SKIP = ("cold_s", "cold_e", "window", "refresh_every", "warm_up", "threshold")
_LINES = [
    *(Column(name, "") for name in ("calibrated_on", "measured_on")),
    *(Column(name, "") for figure in _FIGURES for name in (figure, f"{figure}_standard_error")),
    *(Column(name, "") for name in ("tokens", *_SKIP, "calibration_ratio")),
]


def print_comparison(
    comparison: Comparison, facts: dict[str, Any], format: Literal["table", "md", "csv", "json"]
) -> None:
    """Print a comparison to stdout: matrices and an answer in words, or for programs one line or object per cell.

    Args:
        comparison: what was measured.
        facts: what JSON says besides, such as the name of the model.
        format: how to print it.
    """
    match format:
        case "json":
            print_json({"schema": "ffnskip-compare-text/v1", **facts, **_document(comparison)})
        case "csv":
            profiles = {profile["calibrated_on"]: profile for profile in _profiles(comparison)}
            render([_flat(cell) | profiles[cell["calibrated_on"]] for cell in _cells(comparison)], _LINES, "csv")
        case _:
            _print_page(comparison, format)


def answer(comparison: Comparison) -> list[str]:
    """Three sentences: how far the ratio moves from text to text, what that does to the KL, and why."""
    calibrated, measured = comparison.calibrated, comparison.measured
    foreign = list(permutations(range(len(measured)), 2))
    own_kind = _range([measured[index][index].skip_ratio.mean for index in range(len(measured))])
    elsewhere = _range([measured[row][column].skip_ratio.mean for row, column in foreign])
    differences = {cell: comparison.kl_difference(*cell) for cell in foreign}
    beyond = sum(abs(difference.mean) > NOISE * difference.standard_error for difference in differences.values())
    row, column = max(foreign, key=lambda cell: abs(differences[cell].mean))
    here, there = (_cost(comparison.names[index], measured[index][column]) for index in (row, column))
    rules = {each.profile.with_threshold(0.0).skip for each in calibrated}
    return [
        f"Calibrated for a ratio of {calibrated[0].goal.value:g}, the profiles skip {own_kind} of the FFNs on unseen "
        f"text of their own kind, and {elsewhere} on the other texts.",
        f"Their KL differs from that of the text's own profile beyond two standard errors in {beyond or 'none'} of "
        f"{len(foreign)} cases: at most, on {comparison.names[column]}, {here} and {there}.",
        "All profiles have the same rule and differ in the threshold alone: moving it turns one into the other."
        if len(rules) == 1
        else "The texts led to different rules, so a difference in KL need not come from the ratio alone.",
    ]


def _cost(name: str, quality: Quality) -> str:
    return f"that of {name} costs {_plus_minus(quality.kl)} nats per token at ratio {_plus_minus(quality.skip_ratio)}"


def _print_page(comparison: Comparison, format: Literal["table", "md"]) -> None:
    names, target = comparison.names, comparison.calibrated[0].goal.value
    regions = [row | {"region": f"[{row['cold_s']}, {row['cold_e']})"} for row in _profiles(comparison)]
    render(regions, _PROFILES, format, f"Profiles for a ratio of {target:g}")
    columns = [Column("", "calibrated on"), *(Column(f"on {name}", name, ">") for name in names)]
    for figure, title in _TITLES.items():
        texts = [[_plus_minus(getattr(quality, figure)) for quality in row] for row in comparison.measured]
        keys = [column.key for column in columns]
        rows = [dict(zip(keys, [name, *row], strict=True)) for name, row in zip(names, texts, strict=True)]
        render(rows, columns, format, title)
    for sentence in answer(comparison):
        print_sentence(sentence, format)


def _document(comparison: Comparison) -> dict[str, Any]:
    parts = {"calibration": "calibration", "held_out": "evaluation"}
    profiles = [each.profile.model_dump(mode="json") for each in comparison.calibrated]
    return {
        "target_ratio": comparison.calibrated[0].goal.value,
        "texts": [
            {"name": name, **{part: profile[section] for part, section in parts.items()}}
            for name, profile in zip(comparison.names, profiles, strict=True)
        ],
        "profiles": _profiles(comparison),
        "cells": _cells(comparison),
        "answer": answer(comparison),
    }


def _profiles(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "calibrated_on": name,
            **each.profile.skip.model_dump(include=set(_SKIP)),
            "calibration_ratio": each.calibration_ratio,
        }
        for name, each in zip(comparison.names, comparison.calibrated, strict=True)
    ]


def _cells(comparison: Comparison) -> list[dict[str, Any]]:
    """One per profile and text."""
    return [
        {
            "calibrated_on": row,
            "measured_on": column,
            **{figure: getattr(quality, figure).mean for figure in _FIGURES},
            "tokens": quality.tokens,
            "standard_error": {figure: getattr(quality, figure).standard_error for figure in _FIGURES},
        }
        for row, qualities in zip(comparison.names, comparison.measured, strict=True)
        for column, quality in zip(comparison.names, qualities, strict=True)
    ]


def _flat(cell: dict[str, Any]) -> dict[str, Any]:
    return cell | {f"{figure}_standard_error": error for figure, error in cell["standard_error"].items()}


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def _plus_minus(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f} ± {estimate.standard_error:.3f}"
