"""A profile as a figure of panels in shades of grey only, or as a page that holds it."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnskip.errors import FfnskipError
from ffnskip.files import replacing
from ffnskip_cli.report.page import page

if TYPE_CHECKING:
    from ffnskip.profiles.evidence import CurvePoint, Measured, SimilarityCurve
    from ffnskip.profiles.profile import Profile
    from ffnskip.profiles.schema import Skip

# No date in the file, and ids that do not depend on chance: the same profile gives the same bytes.
METADATA: dict[str, dict[str, None]] = {
    ".png": {},
    ".svg": dict.fromkeys(("Date", "Creator", "Format", "Type")),
    ".pdf": {"CreationDate": None},
}
STYLE = ["default", {"svg.hashsalt": "ffnskip", "svg.fonttype": "none"}]
_LAYOUT = {1: "A", 2: "AB", 3: "AA;BC", 4: "AB;CD"}
_INCHES = {1: (8, 4.5), 2: (9.5, 4), 3: (9.5, 7.5), 4: (9.5, 7.5)}
_LARGEST = 1e100  # a profile may hold any finite number, but axes whose length overflows cannot be drawn
Drawing = Callable[[Any], None]
TITLES = {
    "similarity": "How little each FFN changes its input",
    "ratio": "What a threshold skips",
    "kl": "What skipping costs",
    "first-skip": "Where skipping begins",
}
_OF_WHOLE_FFNS = {"similarity", "first-skip"}  # which tell nothing of a rule that leaves out parts
_TICKS = (-1, -0.5, 0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)
_NEAREST_TO_ONE = 1e-4  # of 1 - cos; beyond it the logarithm would stretch the axis for nothing
_CURVE = {"color": "0.45", "marker": "o", "markerfacecolor": "white", "markersize": 5, "label": "other thresholds"}
_OWN = {"color": "black", "marker": "D", "markersize": 7, "linestyle": "none", "capsize": 3}


def plot_profile(profile: Profile, path: str | os.PathLike[str], panels: Sequence[str] = ()) -> None:
    """Draw a profile to a .png, .svg, .pdf or, with its figures beside the picture, .html file.

    Args:
        profile: what to draw.
        path: the file, complete or untouched when this returns or fails.
        panels: names of `TITLES`; none means all that it has the data for and that tell of its rule.

    Raises:
        FfnskipError: the suffix is another, the profile lacks the data or holds absurdly large numbers, matplotlib is
            missing, or the file cannot be written.
    """
    target = Path(path)
    kind = plot_kind(target)
    chosen = _chosen(profile, panels)
    _refuse_absurd(profile)
    if kind == ".html":
        captions = [
            f"({letter}) {TITLES[name]}: {caption(name, profile)}" for letter, name in zip("abcd", chosen, strict=False)
        ]
        data = page(profile, _figure(profile, chosen, ".svg").decode(), captions).encode()
    else:
        data = _figure(profile, chosen, kind)
    write_picture(target, data)


def plot_kind(target: Path) -> str:
    """The suffix of a file that can be drawn to; raises FfnskipError for any other, and without matplotlib."""
    kind = target.suffix.lower()
    if kind != ".html" and kind not in METADATA:
        raise FfnskipError(f"cannot plot to {target}: name a file that ends with .png, .svg, .pdf or .html.")
    refuse_without_matplotlib()
    return kind


def refuse_without_matplotlib() -> None:
    """Raise FfnskipError where it is not installed: it is an extra."""
    if importlib.util.find_spec("matplotlib") is None:
        raise FfnskipError("Plotting needs matplotlib: pip install 'ffnskip[plot]'.")


def _chosen(profile: Profile, panels: Sequence[str]) -> dict[str, Drawing]:
    available = drawings(profile)
    for name in panels:
        if name not in TITLES:
            raise FfnskipError(f"no panel is called {name!r}: choose from {', '.join(TITLES)}.")
        if name not in available:
            raise FfnskipError(f"the profile has no data for the panel {name}; calibrate the model again to record it.")
    untold = _OF_WHOLE_FFNS if profile.skip.by.leaves_out_parts else set()
    chosen = panels or available.keys() - untold
    if not chosen:
        raise FfnskipError("the profile has nothing to plot; calibrate the model again to record its curves.")
    return {name: drawing for name, drawing in available.items() if name in chosen}


def _refuse_absurd(profile: Profile) -> None:
    numbers = [profile.skip.threshold, *(number for point in profile.curve for number in point)]
    if profile.measured:
        numbers += [profile.measured.kl, *profile.measured.standard_error.values()]
    largest = max(numbers, key=abs)
    if abs(largest) > _LARGEST:
        raise FfnskipError(f"the profile holds a number that is too large to draw, {largest:g}; correct it.")


def _figure(profile: Profile, chosen: dict[str, Drawing], kind: str) -> bytes:
    from matplotlib import style
    from matplotlib.figure import Figure

    data = io.BytesIO()
    with style.context(STYLE):
        figure = Figure(figsize=_INCHES[len(chosen)], layout="constrained")
        places = figure.subplot_mosaic(_LAYOUT[len(chosen)])
        for (letter, axes), (name, draw) in zip(places.items(), chosen.items(), strict=True):
            draw(axes)
            _legend(axes, f"({letter.lower()}) {TITLES[name]}" if len(chosen) > 1 else "")
        figure.suptitle(profile.model.id, parse_math=False)
        figure.savefig(data, format=kind[1:], dpi=150, metadata=METADATA[kind])
    return data.getvalue()


def _legend(axes: Any, title: str) -> None:
    """Put the legend above the axes, where it covers nothing, and the panel's title, if it has one, above that."""
    if not title:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
        return
    entries = len(axes.get_legend_handles_labels()[0])
    two_rows = {"ncols": -(-entries // 2), "fontsize": "small", "columnspacing": 1}
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1),
        frameon=False,
        title=title,
        title_fontproperties={"weight": "bold"},
        alignment="left",
        **two_rows,
    )


def write_picture(target: Path, data: bytes) -> None:
    """Write the file; it is complete or untouched, never half written."""
    try:
        with replacing(target) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise FfnskipError(f"cannot write {target} ({error.strerror}); name another file with --plot.") from None


def caption(name: str, profile: Profile) -> str:
    """What a panel of `TITLES` shows, in words."""
    skip, rule = profile.skip, profile.skip.by
    match name:
        case "similarity":
            cold = skip.cold_s > 0 or skip.cold_e < profile.model.n_layers
            return (
                "the mean of cos(h, h + FFN(h)) over tokens, layer by layer, and the band of the middle 80%; the axis "
                "is stretched towards 1."
                + f" The rule does not decide by it, but by {rule.decides_by}." * (not rule.by_similarity)
                + " The hatched cold regions always run." * cold
            )
        case "ratio":
            of = f" {rule.axis}" if rule.unit else ""
            return f"every threshold{of} gives a share of FFNs that are skipped; the marked one is the profile's."
        case "kl":
            return "what skipping that share costs, as KL from the dense model on held-out text."
        case _:
            return "in which layer tokens skip their first FFN, and how many never skip one."


def drawings(profile: Profile) -> dict[str, Drawing]:
    """By name and in the order of `TITLES`, how to draw each panel that the profile has the data for."""
    found: dict[str, Drawing] = {}
    measured = profile.measured
    if profile.similarity:
        found["similarity"] = partial(_similarity, similarity=profile.similarity, skip=profile.skip)
    if profile.curve:
        curve = sorted(profile.curve)
        found["ratio"] = partial(_ratio, curve=curve, skip=profile.skip, measured=measured)
        found["kl"] = partial(_kl, curve=curve, measured=measured)
    if measured and measured.first_skipped is not None:
        never = measured.never_skip_fraction
        found["first-skip"] = partial(_first_skip, shares=measured.first_skipped, never=never, skip=profile.skip)
    return found


def _similarity(axes: Any, similarity: SimilarityCurve, skip: Skip) -> None:
    """Mean and 10-90 % band of cos(h, h + FFN(h)) per decoder layer.

    Layer 0 may be near 0 and the skip region between 0.94 and 0.98, so the axis is logarithmic in 1 - cos: every value
    is in its true place, and what matters near 1 can be told apart.
    """
    n_layers = len(similarity.mean)
    layers = range(n_layers)
    axes.fill_between(layers, similarity.low, similarity.high, color="0.8", linewidth=0, label="10–90 % of tokens")
    axes.plot(layers, similarity.mean, color="black", marker="o", markersize=4, label="mean")
    _cold_regions(axes, skip, n_layers)
    values = [*similarity.low, *similarity.mean]
    if skip.by.by_similarity and -1 <= skip.threshold < 1:
        axes.axhline(skip.threshold, color="black", linestyle="--", label=f"threshold {skip.threshold:.4f}")
        values.append(skip.threshold)
    _nines_scale(axes, min(values), max(*values, *similarity.high))
    axes.set_xlim(-0.5, n_layers - 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("cos(h, h + FFN(h))")


def _ratio(axes: Any, curve: Sequence[CurvePoint], skip: Skip, measured: Measured | None) -> None:
    """Skip ratio against threshold, the profile's own point marked."""
    axes.plot([point.threshold for point in curve], [100 * point.skip_ratio for point in curve], **_CURVE)
    if measured:
        _own_point(
            axes, skip.threshold, 100 * measured.skip_ratio, None, _percent(measured.standard_error, "skip_ratio")
        )
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.locator_params(axis="x", nbins=6)
    _floor_at_zero(axes)
    axes.set_xlabel(f"threshold {skip.by.axis}".rstrip())
    axes.set_ylabel("skip ratio (% of FFNs)")


def _kl(axes: Any, curve: Sequence[CurvePoint], measured: Measured | None) -> None:
    """KL divergence from the dense model against skip ratio, the profile's own point marked."""
    axes.plot([100 * point.skip_ratio for point in curve], [point.kl for point in curve], **_CURVE)
    if measured:
        error = measured.standard_error
        _own_point(axes, 100 * measured.skip_ratio, measured.kl, _percent(error, "skip_ratio"), error.get("kl"))
    axes.set_xlim(left=0)
    _floor_at_zero(axes)
    axes.set_xlabel("skip ratio (% of FFNs)")
    axes.set_ylabel("KL divergence (nats per token)")


def _first_skip(axes: Any, shares: Sequence[float], never: float, skip: Skip) -> None:
    """Share of tokens by the layer of their first skipped FFN; a bar of its own for those that skip none."""
    n_layers = len(shares)
    none = n_layers + max(1, n_layers // 15)
    axes.bar(range(n_layers), [100 * share for share in shares], color="0.3", label="first skipped FFN")
    never_label = f"no FFN skipped: {100 * never:.1f} %"
    axes.bar(none, 100 * never, color="white", edgecolor="black", hatch="....", label=never_label)
    _cold_regions(axes, skip, n_layers)
    located = axes.xaxis.get_major_locator().tick_values(0, n_layers - 1)
    ticks = sorted({int(tick) for tick in located if 0 <= tick < n_layers})
    axes.set_xticks([*ticks, none], [*map(str, ticks), "none"])
    axes.set_xlim(-0.5, none + 0.9)
    _floor_at_zero(axes)
    axes.set_xlabel("decoder layer of the first skipped FFN")
    axes.set_ylabel("share of tokens (%)")


def _cold_regions(axes: Any, skip: Skip, n_layers: int) -> None:
    label = "cold region: never skipped"
    for start, end in ((0, skip.cold_s), (skip.cold_e, n_layers)):
        if start < end:
            axes.axvspan(start - 0.5, end - 0.5, facecolor="0.95", edgecolor="0.6", hatch="//", zorder=0, label=label)
            label = "_one entry in the legend is enough"


def _own_point(axes: Any, x: float, y: float, x_error: float | None, y_error: float | None) -> None:
    label = "this profile" if x_error is None and y_error is None else "this profile, ± standard error"
    axes.errorbar(x, y, xerr=x_error, yerr=y_error, label=label, zorder=3, **_OWN)


def _percent(errors: dict[str, float], name: str) -> float | None:
    return 100 * errors[name] if name in errors else None


def _floor_at_zero(axes: Any) -> None:
    """Let the y axis start at zero, or else a small difference would look like a large one."""
    if axes.dataLim.y0 >= 0:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)


def _nines_scale(axes: Any, lowest: float, highest: float) -> None:
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
