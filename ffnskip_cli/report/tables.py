"""Rows of figures on stdout: a table for people, Markdown for pages, CSV and JSON for programs."""

import csv
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

Format = Literal["table", "md", "csv"]
Row = Mapping[str, object]

NOT_MEASURED = "–"
_NO_LIMIT = 10_000  # columns; a table that is wider than the terminal is better wrapped by it than cut off by us


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: where its values are found in a row, and its name in CSV.
        header: its name in a table and in Markdown.
        spec: how values read there, as in `format(value, spec)`; a column that has one is aligned to the right.
    """

    key: str
    header: str
    spec: str = ""

    def text(self, row: Row) -> str:
        """The value as people read it; a dash for None, NaN and infinity."""
        value = _finite(row.get(self.key))
        return NOT_MEASURED if value is None else format(value, self.spec)


def render(rows: Sequence[Row], columns: Sequence[Column], format: Format = "table", title: str = "") -> None:
    """Print rows to stdout, one line each, never cut off.

    CSV has no title, and for programs' sake the keys as header, numbers in full, and nothing for None.
    """
    match format:
        case "table":
            _print_table(rows, columns, title)
        case "md":
            _print_markdown(rows, columns, title)
        case "csv":
            _print_csv(rows, columns)


def turned(rows: Sequence[Row], columns: Sequence[Column]) -> tuple[list[Row], list[Column]]:
    """The same table with a line per column, for a few rows of more figures than a terminal is wide.

    The first column's values, which must differ, become the header.
    """
    corner, *figures = columns
    names = [corner.text(row) for row in rows]
    lines: list[Row] = [
        {"figure": figure.header, **{name: figure.text(row) for name, row in zip(names, rows, strict=True)}}
        for figure in figures
    ]
    return lines, [Column("figure", corner.header), *(Column(name, name, ">") for name in names)]


def print_sentence(sentence: str, format: str) -> None:
    """Print a sentence on a line of its own, in Markdown as an item of a list."""
    print(f"- {markdown(sentence)}" if format == "md" else sentence)


def markdown(text: str) -> str:
    """Text that comes from a profile, so that a page shows it and does nothing else: no HTML, image, link or cell."""
    return re.sub(r"[\\|\[\]`]", r"\\\g<0>", escape(text, quote=False))


def print_json(document: object) -> None:
    """Print one JSON document to stdout."""
    print(json_text(document))


def json_text(document: object) -> str:
    """A JSON document; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(document), indent=2, allow_nan=False)


def _print_table(rows: Sequence[Row], columns: Sequence[Column], title: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, show_header=any(column.header for column in columns)
    )
    for column in columns:
        table.add_column(Text(column.header), justify="right" if column.spec else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(column.text(row)) for column in columns))
    stdout = Console(width=_NO_LIMIT, highlight=False)
    with stdout.capture() as page:
        if title:
            stdout.print(Text(title, "bold"))
        stdout.print(table, soft_wrap=True)
    print("\n".join(line.rstrip() for line in page.get().splitlines()), end="\n\n")


def _print_markdown(rows: Sequence[Row], columns: Sequence[Column], title: str) -> None:
    if title:
        print(f"## {title}\n")
    _print_markdown_row([column.header for column in columns])
    print("|" + "|".join("---:" if column.spec else ":---" for column in columns) + "|")
    for row in rows:
        _print_markdown_row([column.text(row) for column in columns])
    print()


def _print_markdown_row(cells: Sequence[str]) -> None:
    print("| " + " | ".join(map(markdown, cells)) + " |")


def _print_csv(rows: Sequence[Row], columns: Sequence[Column]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([column.key for column in columns])
    writer.writerows([_finite(row.get(column.key)) for column in columns] for row in rows)


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
    return value
