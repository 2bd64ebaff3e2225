"""The pictures of a benchmark, in shades of grey only."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from ffnskip_cli.report import html
from ffnskip_cli.report.plot import METADATA, STYLE

_SIZE = (5.0, 3.6)  # inches; as narrow as a phone, whose letters would else be too small
_REM = 36
_MARKS = "oD^vsPX*<>pd"
_OURS = "ffnskip"
Row = Mapping[str, Any]
Curves = dict[str, list[tuple[float, float]]]


def pictures(document: Mapping[str, Any]) -> Iterator[str]:
    """KL against what is saved, layer by layer, and by warm-up; none without the data for it."""
    rows = [*document.get("rows", ()), *(row for point in document.get("sweep", ()) for row in point["rows"])]
    curves: Curves = {}
    for row in rows:
        if row["kl"] and (row["flops_saved_past_warm_up"] or 0) > 0:
            curves.setdefault(row["name"], []).append((row["flops_saved_past_warm_up"], row["kl"]))
    if curves:
        yield _picture(partial(_savings, curves), "KL against the share of all FLOPs saved past the warm-up.")
    for row in rows:
        if row["kl_by_layer"]:
            yield _picture(partial(_layers, row["kl_by_layer"]), "What each layer's skipping adds to the KL.")
    if document.get("warm_up"):
        yield _picture(partial(_warm_ups, document["warm_up"]), "KL by warm-up.")


def _picture(draw: Callable[[Any], None], caption: str) -> str:
    from matplotlib import style
    from matplotlib.figure import Figure

    data = io.StringIO()
    with style.context(STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.grid(color="0.85", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
        figure.savefig(data, format="svg", metadata=METADATA[".svg"])
    return html.picture(data.getvalue(), caption.rstrip("."), [caption], width=_REM)


def _savings(curves: Curves, axes: Any) -> None:
    for index, (name, points) in enumerate(curves.items()):
        style = {"color": "black", "lw": 2.5} if name == _OURS else {"color": "0.4", "lw": 1}
        axes.plot(*zip(*sorted(points), strict=True), marker=_MARKS[index % len(_MARKS)], label=name, **style)
    axes.set(xlabel="saved", ylabel="KL, nats per token")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0%}")


def _layers(added: list[float], axes: Any) -> None:
    axes.bar(range(len(added)), added, color="0.3")
    axes.set(xlabel="layer", ylabel="KL it adds, nats per token")


def _warm_ups(rows: list[Row], axes: Any) -> None:
    tried, kl, error = ([row[name] for row in rows] for name in ("warm_up", "kl", "standard_error"))
    axes.errorbar(tried, kl, yerr=error, color="black", marker="o", capsize=3)
    axes.set(xlabel="warm-up, tokens", ylabel="KL, nats per token")
    axes.set_ylim(bottom=0)
