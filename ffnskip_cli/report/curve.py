"""The similarity of every layer as a bar chart made of characters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ffnskip.profiles.evidence import SimilarityCurve
    from ffnskip.profiles.schema import Skip

_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"
_OFF_AXIS = "◂ off the axis"


def draw(similarity: SimilarityCurve, skip: Skip) -> str:
    """One row per layer: its number, a bar for the mean, the mean, the 10-90 % band, and `cold` or `skip`.

    The axis ends at 1 and starts just below the lowest mean of the skip region, or else the few hundredths that tell
    its layers apart would drown in the distance to the first layer, which may be anywhere. `┊` is the threshold of a
    rule that decides by similarity.
    """
    # The distance to 1 is kept above zero for a model whose FFNs do nothing at all.
    floor = 1 - 1.1 * max(1 - min(similarity.mean[skip.cold_s : skip.cold_e]), 1e-3)
    tick = _position(skip.threshold, floor) if skip.by.by_similarity else -1.0
    left, right = f"{floor:.3f}", "1.000"
    rows = [f"layer  {left}{right:>{_WIDTH - len(left)}}    mean   10–90 % of tokens"]
    for layer, (mean, low, high) in enumerate(zip(similarity.mean, similarity.low, similarity.high, strict=True)):
        bar = _bar(_position(mean, floor), tick)
        mark = "skip" if skip.cold_s <= layer < skip.cold_e else "cold"
        rows.append(f"{layer:5}  {bar}  {mean:6.4f}  {low:7.4f} – {high:6.4f}  {mark}")
    if 0 <= tick < _WIDTH:
        rows.append(f"{'':7}┊ threshold {skip.threshold:.4f}")
    return "\n".join(rows)


def _position(value: float, floor: float) -> float:
    """Where a value lies on the axis, in columns."""
    return (value - floor) / (1 - floor) * _WIDTH


def _bar(length: float, tick: float) -> str:
    """A bar of `length` columns, then blanks, with the threshold's tick where a blank leaves it visible."""
    if length < 0:
        drawn = _OFF_AXIS
    else:
        full, eighths = divmod(round(length * 8), 8)
        drawn = "█" * full + _EIGHTHS[eighths].strip()
    columns = list(drawn.ljust(_WIDTH))
    if len(drawn) <= tick < _WIDTH:
        columns[int(tick)] = "┊"
    return "".join(columns)
