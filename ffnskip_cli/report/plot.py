"""The similarity of every layer as a figure."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnskip.errors import FfnskipError

if TYPE_CHECKING:
    from ffnskip.profile import Profile, SimilarityCurve, Skip

# No date in the file, and ids that do not depend on chance: the same profile gives the same bytes.
_METADATA: dict[str, dict[str, None]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
_STYLE = ["default", {"svg.hashsalt": "ffnskip", "svg.fonttype": "none"}]

_TICKS = (-1, -0.5, 0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)
_NEAREST_TO_ONE = 1e-4  # of 1 - cos; beyond it the logarithm would stretch the axis for nothing


def plot_similarity(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Write the mean and the 10-90 % band of cos(h, h + FFN(h)) per decoder layer to a .png, .svg or .pdf file.

    Layer 0 may be near 0 and the skip region between 0.94 and 0.98, so the axis is logarithmic in 1 - cos: every value
    is in its true place, and what matters near 1 can be told apart. Raises FfnskipError if the suffix is another, the
    profile has no curve, matplotlib is missing, or the file cannot be written.
    """
    target = Path(path)
    kind = target.suffix.lower()
    if kind not in _METADATA:
        raise FfnskipError(f"cannot plot to {target}: name a file that ends with .png, .svg or .pdf.")
    if profile.similarity is None:
        raise FfnskipError("the profile has no similarity curve to plot; calibrate the model again to record one.")
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError:
        raise FfnskipError("plotting needs matplotlib: pip install 'ffnskip[plot]'.") from None
    data = io.BytesIO()
    with style.context(_STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        _draw(figure.subplots(), profile.similarity, profile.skip)
        figure.suptitle(profile.model.id)
        figure.savefig(data, format=kind[1:], dpi=150, metadata=_METADATA[kind])
    _write(target, data.getvalue())


def _draw(axes: Any, similarity: SimilarityCurve, skip: Skip) -> None:
    n_layers = len(similarity.mean)
    layers = range(n_layers)
    axes.fill_between(layers, similarity.low, similarity.high, color="0.8", linewidth=0, label="10–90 % of tokens")
    axes.plot(layers, similarity.mean, color="black", marker="o", markersize=4, label="mean")
    label = "cold region: never skipped"
    for start, end in ((0, skip.cold_s), (skip.cold_e, n_layers)):
        if start < end:
            axes.axvspan(start - 0.5, end - 0.5, facecolor="0.95", edgecolor="0.6", hatch="//", zorder=0, label=label)
            label = "_one entry in the legend is enough"
    values = [*similarity.low, *similarity.mean]
    if -1 <= skip.threshold < 1:
        axes.axhline(skip.threshold, color="black", linestyle="--", label=f"threshold {skip.threshold:.4f}")
        values.append(skip.threshold)
    _scale(axes, min(values), max(*values, *similarity.high))
    axes.set_xlim(-0.5, n_layers - 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("cos(h, h + FFN(h))")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)


def _scale(axes: Any, lowest: float, highest: float) -> None:
    """Make the y axis logarithmic in 1 - cos, from a little below `lowest` to a little above `highest`."""
    import numpy as np

    def nines(cosine: Any) -> Any:
        return -np.log10(np.maximum(1 - np.asarray(cosine), _NEAREST_TO_ONE))

    axes.set_yscale("function", functions=(nines, lambda height: 1 - 10.0 ** -np.asarray(height)))
    bottom, top = (1 - factor * max(1 - end, _NEAREST_TO_ONE) for end, factor in ((lowest, 1.15), (highest, 0.85)))
    axes.set_ylim(bottom, top)
    ticks = [tick for tick in _TICKS if bottom <= tick <= top]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)


def _write(target: Path, data: bytes) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.write_bytes(data)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FfnskipError(f"cannot write {target} ({error.strerror}); name another file with --plot.") from None
