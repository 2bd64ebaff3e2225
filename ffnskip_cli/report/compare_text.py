"""A comparison of calibration texts as tables, lines and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ffnskip_cli.calibration.assemble import evaluation_text
from ffnskip_cli.report.compare_words import answer
from ffnskip_cli.report.tables import Column, print_json, render

if TYPE_CHECKING:
    from ffnskip_cli.calibration.compare import Comparison
    from ffnskip_cli.measure.quality import Estimate, Quality

SCHEMA = "ffnskip-compare-text/v1"
_FIGURES = ("skip_ratio", "kl", "perplexity_dense", "perplexity", "top1_agreement")
_ERROR = "_standard_error"

_PROFILES = [
    Column("calibrated_on", "calibrated on"),
    Column("region", "skip region"),
    Column("window", "window", "d"),
    Column("refresh_every", "refresh every", "d"),
    Column("warm_up", "warm-up", "d"),
    Column("threshold", "threshold", ".6f"),
    Column("calibration_ratio", "ratio (calibration)", ".3f"),
]
_LINES = [
    Column("calibrated_on", ""),
    Column("measured_on", ""),
    *(Column(name, "") for figure in _FIGURES for name in (figure, figure + _ERROR)),
    Column("tokens", ""),
    *(Column(name, "") for name in ("cold_s", "cold_e", "window", "refresh_every", "warm_up", "threshold")),
    Column("calibration_ratio", ""),
]
_TITLES = {
    "skip_ratio": "Skip ratio, calibrated on (rows) and measured on (columns)",
    "kl": "KL in nats per token, likewise",
    "perplexity": "Perplexity, likewise",
}


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
            print_json({"schema": SCHEMA, **facts, **_document(comparison)})
        case "csv":
            profiles = _profiles(comparison)
            render([_flat(cell) | profiles[cell["row"]] for cell in _cells(comparison)], _LINES, "csv")
        case _:
            _print_page(comparison, format)


def _print_page(comparison: Comparison, format: Literal["table", "md"]) -> None:
    render(_profiles(comparison), _PROFILES, format, f"Profiles for a ratio of {comparison.target:g}")
    names = [text.name for text in comparison.texts]
    columns = [Column("", "calibrated on"), *(Column(f"on {name}", name, ">") for name in names)]
    for figure, title in _TITLES.items():
        digits = 2 if figure == "perplexity" else 3
        rows: list[dict[str, object]] = []
        if figure == "perplexity":
            dense = [quality.perplexity_dense for quality in comparison.measured[0]]
            rows.append({"": "(dense)"} | _line(names, dense, digits))
        for name, qualities in zip(names, comparison.measured, strict=True):
            rows.append({"": name} | _line(names, [getattr(quality, figure) for quality in qualities], digits))
        render(rows, columns, format, title)
    for sentence in answer(comparison):
        print(f"- {sentence}" if format == "md" else sentence)


def _line(names: list[str], estimates: list[Estimate], digits: int) -> dict[str, object]:
    return {
        f"on {name}": f"{estimate.mean:.{digits}f} ± {estimate.standard_error:.{digits}f}"
        for name, estimate in zip(names, estimates, strict=True)
    }


def _document(comparison: Comparison) -> dict[str, Any]:
    return {
        "target_ratio": comparison.target,
        "texts": [
            {
                "name": text.name,
                "calibration": evaluation_text(text.calibration).model_dump(mode="json"),
                "held_out": evaluation_text(text.held_out).model_dump(mode="json"),
            }
            for text in comparison.texts
        ],
        "profiles": [{name: value for name, value in row.items() if name != "region"} for row in _profiles(comparison)],
        "cells": [{name: value for name, value in cell.items() if name != "row"} for cell in _cells(comparison)],
        "answer": answer(comparison),
    }


def _profiles(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "calibrated_on": text.name,
            "region": f"[{profile.skip.cold_s}, {profile.skip.cold_e})",
            **profile.skip.model_dump(exclude={"rule"}),
            "calibration_ratio": ratio,
        }
        for text, profile, ratio in zip(
            comparison.texts, comparison.profiles, comparison.calibration_ratios, strict=True
        )
    ]


def _cells(comparison: Comparison) -> list[dict[str, Any]]:
    """One per profile and text; on its own text a profile differs from nothing."""
    places = range(len(comparison.texts))
    return [
        {
            "row": row,
            "calibrated_on": comparison.texts[row].name,
            "measured_on": comparison.texts[column].name,
            **_figures(comparison.measured[row][column]),
            "difference": None if row == column else _differences(comparison, row, column),
        }
        for row in places
        for column in places
    ]


def _figures(quality: Quality) -> dict[str, Any]:
    estimates: dict[str, Estimate] = {figure: getattr(quality, figure) for figure in _FIGURES}
    return {
        **{figure: estimate.mean for figure, estimate in estimates.items()},
        "tokens": quality.tokens,
        "standard_error": {figure: estimate.standard_error for figure, estimate in estimates.items()},
    }


def _differences(comparison: Comparison, row: int, column: int) -> dict[str, Any]:
    """From the text's own profile; those in KL are paired by sequence."""
    in_kl = {
        "kl": comparison.kl_difference(row, column),
        "kl_at_equal_ratio": comparison.kl_difference_at_equal_ratio(row, column),
    }
    return {
        "same_rule": comparison.same_rule(row, column),
        "skip_ratio": comparison.ratio_difference(row, column),
        **{name: found and found.mean for name, found in in_kl.items()},
        "standard_error": {name: found and found.standard_error for name, found in in_kl.items()},
    }


def _flat(cell: dict[str, Any]) -> dict[str, Any]:
    return cell | {figure + _ERROR: error for figure, error in cell["standard_error"].items()}
