"""The pictures of an evaluation, in shades of grey only."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ffnskip_cli.report import html
from ffnskip_cli.report.plot import METADATA, STYLE

_WIDTH, _ROW = 5.0, 0.34  # inches; as narrow as a phone, whose letters would else be too small
_REM = 36
_INTERVAL = 1.96  # standard errors
_COLLAPSED = ("repeated 4-grams", "ends in a loop")
Row = Mapping[str, Any]


def pictures(document: Mapping[str, Any]) -> Iterator[str]:
    """What the profile changes, and how much the texts repeat themselves; none without the data for it."""
    shares = [row for row in document["rows"] if 0 <= row["dense"] <= 1]
    if shares:
        caption = "Difference that the profile makes to each figure, with its 95 % interval over pairs of answers."
        yield html.picture(_figure(shares, _differences), "Differences", [caption], width=_REM)
    collapsed = [row for row in document["writing"] if row["metric"] in _COLLAPSED]
    if collapsed:
        caption = "How much the texts repeat themselves: open marks dense, filled ones with the profile."
        yield html.picture(_figure(collapsed, _collapse), "Repetition", [caption], width=_REM)


def _figure(rows: Sequence[Row], draw: Callable[[Any, Sequence[Row]], None]) -> str:
    from matplotlib import style
    from matplotlib.figure import Figure

    data = io.StringIO()
    with style.context(STYLE):
        figure = Figure(figsize=(_WIDTH, 1 + _ROW * len(rows)), layout="constrained")
        axes = figure.subplots()
        draw(axes, rows)
        axes.set_yticks(range(len(rows)), [_name(row) for row in rows], fontsize="small", parse_math=False)
        axes.invert_yaxis()
        axes.grid(axis="x", color="0.85", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        figure.savefig(data, format="svg", metadata=METADATA[".svg"])
    return data.getvalue()


def _name(row: Row) -> str:
    """A label of two lines: the task with its part or filter, and the metric."""
    of = row.get("part") or row.get("filter") or ""
    return f"{row['task']} {of}".replace(" none", "").rstrip() + f"\n{row['metric']}"


def _differences(axes: Any, rows: Sequence[Row]) -> None:
    axes.axvline(0, color="0.5", linewidth=0.8)
    for place, row in enumerate(rows):
        error = _INTERVAL * (row["difference_stderr"] or 0.0)
        axes.errorbar(row["difference"], place, xerr=error, color="black", marker="D", markersize=5, capsize=3)
    axes.set_xlabel("with the profile − dense")


def _collapse(axes: Any, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        for column, shift, fill in (("dense", -0.13, "white"), ("ffnskip", 0.13, "black")):
            error = _INTERVAL * (row[f"{column}_stderr"] or 0.0)
            marks = {"color": "black", "marker": "o", "markersize": 5, "markerfacecolor": fill, "capsize": 2}
            axes.errorbar(row[column], place + shift, xerr=error, **marks)
    axes.set_xlim(left=0)
    axes.set_xlabel("share")
