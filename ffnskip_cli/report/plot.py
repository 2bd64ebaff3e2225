"""A profile as a figure, or as a page that holds it."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnskip.errors import FfnskipError
from ffnskip.files import replacing
from ffnskip_cli.report.page import page
from ffnskip_cli.report.panels import TITLES, Drawing, caption, drawings

if TYPE_CHECKING:
    from ffnskip.profiles.profile import Profile

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


def plot_profile(profile: Profile, path: str | os.PathLike[str], panels: Sequence[str] = ()) -> None:
    """Draw a profile to a .png, .svg, .pdf or, with its figures beside the picture, .html file.

    Args:
        profile: what to draw.
        path: the file, complete or untouched when this returns or fails.
        panels: names of `TITLES`; none means all that the profile has the data for.

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
        raise FfnskipError("plotting needs matplotlib: pip install matplotlib.")


def _chosen(profile: Profile, panels: Sequence[str]) -> dict[str, Drawing]:
    available = drawings(profile)
    for name in panels:
        if name not in TITLES:
            raise FfnskipError(f"no panel is called {name!r}: choose from {', '.join(TITLES)}.")
        if name not in available:
            raise FfnskipError(f"the profile has no data for the panel {name}; calibrate the model again to record it.")
    if not available:
        raise FfnskipError("the profile has nothing to plot; calibrate the model again to record a similarity curve.")
    return {name: drawing for name, drawing in available.items() if not panels or name in panels}


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
