"""A comparison of calibration texts as two heat maps in shades of grey, with the numbers in their cells."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnskip.errors import FfnskipError
from ffnskip_cli.report.plot import METADATA, STYLE, refuse_without_matplotlib, write_picture

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ffnskip_cli.calibration.compare import Comparison
    from ffnskip_cli.measure.quality import Estimate

_TITLES = {"skip_ratio": "(a) Skip ratio", "kl": "(b) KL divergence (nats per token)"}
_NOTE = "thick frame: a profile on unseen text of its own kind"


def heat_map_kind(path: Path) -> str:
    """The suffix of a file that can be drawn to; raises FfnskipError for any other."""
    kind = path.suffix.lower()
    if kind not in METADATA:
        raise FfnskipError(f"cannot plot to {path}: name a file that ends with .png, .svg or .pdf.")
    refuse_without_matplotlib()
    return kind


def plot_comparison(comparison: Comparison, title: str, path: Path) -> None:
    """Draw the ratio and the KL of every profile (rows) on every text (columns).

    Args:
        comparison: what was measured.
        title: of the figure.
        path: a .png, .svg or .pdf file, complete or untouched when this returns or fails.

    Raises:
        FfnskipError: the suffix is another, matplotlib is missing, or the file cannot be written.
    """
    kind = heat_map_kind(path)
    from matplotlib import style
    from matplotlib.figure import Figure

    names = comparison.names
    data = io.BytesIO()
    with style.context(STYLE):
        figure = Figure(figsize=(4 + 1.9 * len(names), 2.2 + 0.75 * len(names)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (figure_name, panel_title) in zip(panels, _TITLES.items(), strict=True):
            table = [[getattr(quality, figure_name) for quality in row] for row in comparison.measured]
            _draw(axes, table, names)
            axes.set_title(panel_title, fontsize="medium", fontweight="bold", loc="left")
        panels[0].set_ylabel("calibrated on")
        figure.supxlabel(_NOTE, fontsize="small")
        figure.suptitle(title, parse_math=False)
        figure.savefig(data, format=kind[1:], dpi=150, metadata=METADATA[kind])
    write_picture(path, data.getvalue())


def _draw(axes: Any, table: Sequence[Sequence[Estimate]], names: Sequence[str]) -> None:
    """White is zero, so that a small difference looks small, and no cell is too dark for its number."""
    from matplotlib.patches import Rectangle

    means = [[estimate.mean for estimate in row] for row in table]
    largest = max(map(max, means))
    axes.imshow(means, cmap="Greys", vmin=0, vmax=2 * largest if largest > 0 else 1, aspect="auto")
    for y, row in enumerate(table):
        for x, estimate in enumerate(row):
            text = f"{estimate.mean:.3f}\n± {estimate.standard_error:.3f}"
            axes.text(x, y, text, ha="center", va="center")
        axes.add_patch(Rectangle((y - 0.47, y - 0.47), 0.94, 0.94, fill=False, edgecolor="black", linewidth=2.5))
    places = range(len(names))
    axes.set_xticks(places, names, rotation=20, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(places, names, parse_math=False)
    axes.tick_params(length=0)
    axes.set_xlabel("measured on")
