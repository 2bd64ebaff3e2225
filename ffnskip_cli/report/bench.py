"""What `ffnskip bench` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from ffnskip_cli.report.tables import Column, print_sentence, render, turned

Format = Literal["table", "md", "csv"]
_FIGURES = [
    Column("skip_ratio", "skip ratio", ".3f"),
    Column("flops_per_token", "FLOPs/token", ".3g"),
    Column("flops_saved", "FLOPs saved", ".1%"),
    Column("flops_saved_past_warm_up", "past warm-up", ".1%"),
    Column("never_skip_fraction", "never skip", ".1%"),
    Column("tokens_per_second", "tokens/s", ".1f"),
    Column("decode_skip_ratio", "timed ratio", ".3f"),
    Column("speedup", "speed-up", ".2f"),
    Column("ceiling", "ceiling", ".2f"),
    Column("perplexity", "perplexity", ".2f"),
    Column("kl", "KL", ".4f"),
    Column("kl_error", "± KL", ".4f"),
    Column("kl_of_99", "KL, 99 % of tokens", ".3f"),
    Column("top1_agreement", "top-1 agreement", ".3f"),
    Column("repetition", "repetition", ".3f"),
]
_WORST = [
    Column("name", "rule"),
    Column("threshold", "threshold", "g"),
    Column("length", "new tokens"),
    Column("never_skip_fraction", "never skip", ".2%"),
    Column("from", "of those from"),
    Column("never_skip_fraction_here", "never skip", ".2%"),
    Column("skip_ratio", "skip ratio", ".3f"),
]
_WARM_UPS = [
    Column("warm_up", "warm-up"),
    Column("kl", "KL", ".4f"),
    Column("standard_error", "± against the best", ".4f"),
    Column("repetition", "repetition", ".3f"),
]


def print_document(document: dict[str, Any], format: Format) -> None:
    """Print the tables that a document of `bench` holds, and a sentence for whatever could not be had."""
    if "rows" in document:
        _print_rows(document["rows"], format)
    if "sweep" in document:
        _print_sweep(document["sweep"], format)
    if "worst_case" in document:
        render(document["worst_case"], _WORST, format, title="Tokens that never skip (the paper's Table 6)")
    if "warm_up" in document:
        render(document["warm_up"], _WARM_UPS, format, title="By warm-up (the paper's Figure 5)")


def print_breakdown(rows: Sequence[dict[str, Any]], format: Format) -> bool:
    """Print where the time of a token goes; False where that is not known of any row."""
    timed = [{"name": row["name"]} | row["breakdown"] for row in rows if row["breakdown"]]
    if not timed:
        return False
    columns = [Column("name", "ms per token"), *(Column(part, part, ".2f") for part in timed[0] if part != "name")]
    render(timed, columns, format)
    return True


def _print_rows(rows: Sequence[dict[str, Any]], format: Format) -> None:
    flat = [_flat(row) for row in rows if row["missing"] is None]
    columns = [Column("name", "row"), *_measured(flat, format)]
    if format == "table" and len(flat) <= len(columns):
        render(*turned(flat, columns))
    else:
        render(flat, columns, format)
    _say_missing(rows, format)
    if format == "csv":  # is one table
        return
    layers = next((row["kl_by_layer"] for row in rows if row["kl_by_layer"]), None)
    if layers:
        by_layer = [{"layer": layer, "kl": kl} for layer, kl in enumerate(layers)]
        render(by_layer, [Column("layer", "layer"), Column("kl", "KL it adds", ".5f")], format)


def _print_sweep(points: Sequence[dict[str, Any]], format: Format) -> None:
    rows = [
        {"target": point["target"], "threshold": point["threshold"]} | _flat(row)
        for point in points
        for row in point["rows"]
        if row["missing"] is None and (row["name"] != "dense" or point is points[0])
    ]
    columns = [Column("target", "asked for", ".2f"), Column("name", "row"), *_measured(rows, format)]
    render(rows, columns, format, title="At several savings (the paper's Table 4)")
    for point in points:
        if point["missing"] and format != "csv":
            print_sentence(point["missing"], format)
        _say_missing(point["rows"], format, f" at {point['target']:g}")


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """With the nested figures that a table shows."""
    return (
        row
        | {"tokens_per_second": (row["tokens_per_second"] or {}).get("median")}
        | {"kl_of_99": (row["kl_percentiles"] or {}).get("99")}
        | {"kl_error": (row["standard_error"] or {}).get("kl")}
    )


def _measured(rows: Sequence[dict[str, Any]], format: Format) -> list[Column]:
    """The columns that some row has a figure for; for programs all."""
    return [column for column in _FIGURES if format == "csv" or any(row[column.key] is not None for row in rows)]


def _say_missing(rows: Sequence[dict[str, Any]], format: Format, where: str = "") -> None:
    for row in rows:
        if row["missing"] is not None and format != "csv":
            print_sentence(f"No row {row['name']}{where}: {row['missing']}.", format)
