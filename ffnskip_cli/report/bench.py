"""What `ffnskip bench` found: tables and sentences, and a page of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ffnskip_cli.report import bench_plot, html
from ffnskip_cli.report.html import Section
from ffnskip_cli.report.tables import Column, print_sentence, render, turned

Format = Literal["table", "md", "csv"]
Document = Mapping[str, Any]

_NAME = Column("name", "row")
_POINT = (Column("target", "asked for", ".2f"), Column("threshold", "threshold", ".3g"))
_FIGURES = (
    Column("skip_ratio", "skip ratio", ".3f"),
    Column("flops_per_token", "FLOPs/token", ".3g"),
    Column("flops_saved", "FLOPs saved", ".1%"),
    Column("flops_saved_past_warm_up", "past warm-up", ".1%"),
    Column("never_skip_fraction", "never skip", ".1%"),
    Column("tokens_per_second", "tokens/s", ".1f"),
    Column("decode_skip_ratio", "timed ratio", ".3f"),
    Column("speedup", "speed-up", ".2f"),
    Column("ceiling", "ceiling", ".2f"),
    Column("first_token_seconds", "first token, s", ".3f"),
    Column("perplexity", "perplexity", ".2f"),
    Column("kl", "KL", ".4f"),
    Column("kl_error", "± KL", ".4f"),
    Column("kl_of_99", "KL, 99 % of tokens", ".3f"),
    Column("kl_reverse", "KL, reversed", ".4f"),
    Column("top1_agreement", "top-1 agreement", ".3f"),
    Column("repetition", "repetition", ".3f"),
)
_WORST = (
    Column("name", "rule of"),
    Column("threshold", "threshold", "g"),
    Column("length", "new tokens", "d"),
    Column("never_skip_fraction", "never skip", ".2%"),
    Column("from", "of those from", "d"),
    Column("never_skip_fraction_here", "never skip", ".2%"),
    Column("skip_ratio", "skip ratio", ".3f"),
)
_WARM_UPS = (
    Column("warm_up", "warm-up", "d"),
    Column("kl", "KL", ".4f"),
    Column("standard_error", "± against the best", ".4f"),
    Column("repetition", "repetition", ".3f"),
)
_LAYERS = (Column("layer", "layer", "d"), Column("kl", "KL it adds", ".5f"))


def print_bench(document: Document, format: Format) -> None:
    """Print all tables and sentences; in CSV the figures of the first table alone, all of them."""
    if format == "csv":
        section = next(_sections(document))
        of_rows = _NAME in section.columns
        named = section.columns[: section.columns.index(_NAME) + 1] if of_rows else ()
        render(section.rows, (*named, *_FIGURES) if of_rows else section.columns, format)
        return
    for section in _sections(document):
        columns = section.columns
        title = "" if columns[0] == _NAME else section.title
        if format == "table" and columns[0] == _NAME and len(section.rows) < len(columns):
            render(*turned(section.rows, columns))
        else:
            render(section.rows, columns, format, title)
        if section.note:
            print(f"{section.note}\n")
    for sentence in _sentences(document):
        print_sentence(sentence, format)


def print_breakdown(rows: Sequence[Mapping[str, Any]], format: Format) -> bool:
    """Print where the time goes: of a token, and how much of a run the prompt is; False where no row's is known."""
    timed = [row for row in rows if row["breakdown"]]
    if not timed:
        return False
    parts = [Column(part, part, ".2f") for part in timed[0]["breakdown"]]
    columns = [Column("name", "ms per token"), *parts, Column("prompt_share", "prompt of the run", ".1%")]
    render([row | row["breakdown"] for row in timed], columns, format)
    return True


def page(document: Document) -> str:
    """The page: what was measured on what, tables and pictures."""
    settings = (
        f"Profile {document['profile']}, threshold {document['threshold']:g}; {document['dtype']} weights "
        f"({document['weights']}) on {document['device']}, {document['path']} path; {document['eval_tokens']} tokens "
        f"of {document['eval_dataset']}."
    )
    parts = [html.items([settings, *_sentences(document)])]
    parts += [html.table(section) for section in _sections(document)]
    return html.document(f"Bench of {document['model']} with a skip profile", [*parts, *bench_plot.pictures(document)])


def _sections(document: Document) -> Iterator[Section]:
    if rows := [_flat(row) for row in document.get("rows", ()) if row["missing"] is None]:
        columns = (_NAME, *_measured(rows))
        yield Section("the profile and its opponents", rows, columns, _how_to_read(columns))
    for row in document.get("rows", ()):
        if row["kl_by_layer"]:
            added = [{"layer": layer, "kl": kl} for layer, kl in enumerate(row["kl_by_layer"])]
            yield Section("what each layer's skipping adds to the KL", added, _LAYERS)
    if reached := [point for point in document.get("sweep", ()) if point["rows"]]:
        rows = [
            {"target": point["target"], "threshold": point["threshold"]} | _flat(row)
            for point in reached
            for row in point["rows"]
            if row["missing"] is None and (row["name"] != "dense" or point is reached[0])
        ]
        columns = (*_POINT, _NAME, *_measured(rows))
        yield Section("at several savings (Table 4 of FFN-SkipLLM)", rows, columns, _how_to_read(columns))
    if "worst_case" in document:
        yield Section("tokens that never skip (its Table 6)", document["worst_case"], _WORST)
    if "warm_up" in document:
        yield Section("by warm-up (its Figure 5)", document["warm_up"], _WARM_UPS)


def _how_to_read(columns: Sequence[Column]) -> str:
    if not any(column.key == "speedup" for column in columns):
        return ""
    return "The speed-up is the median of the ratios of neighbouring runs, not the ratio of the medians of tokens/s."


def _sentences(document: Document) -> Iterator[str]:
    """Of what could not be had."""
    for row in document.get("rows", ()):
        if row["missing"]:
            yield f"No row {row['name']}: {row['missing']}."
    for point in document.get("sweep", ()):
        if point["missing"]:
            yield f"No rows at {point['target']:g}: {point['missing']}."
        yield from (
            f"No row {row['name']} at {point['target']:g}: {row['missing']}." for row in point["rows"] if row["missing"]
        )


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """With the nested figures that a table shows."""
    return {
        **row,
        "tokens_per_second": (row["tokens_per_second"] or {}).get("median"),
        "kl_of_99": (row["kl_percentiles"] or {}).get("99"),
        "kl_error": (row["standard_error"] or {}).get("kl"),
    }


def _measured(rows: Sequence[Mapping[str, Any]]) -> tuple[Column, ...]:
    """The columns that some row has a figure for."""
    return tuple(column for column in _FIGURES if any(row[column.key] is not None for row in rows))
