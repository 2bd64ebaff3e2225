"""How two profiles differ: the headlines in words, and every field. A is the one that was, B the one that is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ffnskip_cli.budget import NOISE
from ffnskip_cli.report.page import short
from ffnskip_cli.report.tables import Column, Row

if TYPE_CHECKING:
    from ffnskip.profiles.evidence import Measured
    from ffnskip.profiles.profile import Profile
    from ffnskip.profiles.schema import ModelInfo

COLUMNS = (Column("field", "field"), Column("a", "A", ">"), Column("b", "B", ">"), Column("change", "change", ">"))
_WIDEST = 24  # characters of a value in a table
_STAGES = "fit.kl"  # a number for each stage of the fit, which are not layers
_THRESHOLD = "skip.threshold"  # a cosine under one rule, nats under the other


@dataclass(frozen=True)
class Change:
    """A field that differs.

    Attributes:
        field: its dotted name, as in the file.
        a, b: the values; None where a profile lacks the field.
        change: b - a of numbers of one unit; of lists with a number for each layer, the largest b - a by size;
            otherwise None.
        layer: the layer of that largest change; None for other fields.
    """

    field: str
    a: Any
    b: Any
    change: float | None = None
    layer: int | None = None

    def row(self) -> Row:
        """The change as a row of a table with `COLUMNS`: lists and long texts are summarised."""
        return {"field": self.field, "a": _shown(self.a), "b": _shown(self.b), "change": self._described()}

    def _described(self) -> str | None:
        if _is_table(self.a) or _is_table(self.b):
            a, b = ({json.dumps(entry) for entry in entries or ()} for entries in (self.a, self.b))
            return f"{len(a - b)} gone, {len(b - a)} new"
        if self.change is None:
            return None
        amount = f"{self.change:+.5g}"
        return amount if self.layer is None else f"{amount} at layer {self.layer}"


def changes(a: Profile, b: Profile) -> list[Change]:
    """All fields that differ, in the order of the file; none for equal profiles."""
    trees = [profile.model_dump(mode="json", by_alias=True) for profile in (a, b)]
    left, right = (dict(_leaves(tree)) for tree in trees)
    sections = list(trees[0])
    names = sorted({**left, **right}, key=lambda name: sections.index(name.partition(".")[0]))
    differing = [name for name in names if left.get(name) != right.get(name)]
    incomparable = {_STAGES} if a.skip.rule == b.skip.rule else {_STAGES, _THRESHOLD}
    return [(Change if name in incomparable else _change)(name, left.get(name), right.get(name)) for name in differing]


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _change(field: str, a: Any, b: Any) -> Change:
    if _is_number(a) and _is_number(b):
        return Change(field, a, b, b - a)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and all(map(_is_number, [*a, *b])):
        differences = [y - x for x, y in zip(a, b, strict=True)]
        layer = max(range(len(differences)), key=lambda i: abs(differences[i]))
        return Change(field, a, b, differences[layer], layer)
    return Change(field, a, b)


def _is_table(value: object) -> bool:
    """Whether this is a list of points, candidates or other entries that are no plain numbers."""
    return isinstance(value, list) and not all(map(_is_number, value))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str | None:
    match value:
        case None:
            return None
        case bool():
            return str(value).lower()
        case list():
            return f"{len(value)} values"
        case _:
            text = str(short(value))
            return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"


def headlines(a: Profile, b: Profile) -> list[str]:
    """Three sentences at most: what both are for, what B skips and costs against A, and the verdict on that."""
    if a == b:
        return ["The profiles are identical."]
    models, old, new = _models(a.model, b.model), a.measured, b.measured
    if old is None or new is None or old == new:
        return [f"{models}."]
    goals = f"; the goal was {old.goal}, and is {new.goal}" if old.goal != new.goal else ""
    skipped = _compared(old, new, "skip_ratio", ".1%", "as many FFNs", ("points fewer FFNs", "points more FFNs"), 100)
    cost = _compared(old, new, "kl", ".3g", "as much KL", ("nats per token less KL", "nats per token more KL"))
    texts = [profile.evaluation.text_sha256 for profile in (a, b) if profile.evaluation]
    unlike = ", but was measured on another text" if len(set(texts)) > 1 else ""
    return [f"{models}{goals}.", f"B skips {skipped} and costs {cost}{unlike}.", _verdicts(old, new)]


def _models(a: ModelInfo, b: ModelInfo) -> str:
    if a.id != b.id:
        return f"The profiles are for different models: A for {a.id}, B for {b.id}"
    differing = [name for name in type(a).model_fields if getattr(a, name) != getattr(b, name)]
    if differing:
        return f"Both are for a model named {a.id}, but B's is another: it differs in {', '.join(differing)}"
    return f"Both are for {a.id}"


def _compared(
    a: Measured, b: Measured, name: str, spec: str, same: str, less_more: tuple[str, str], scale: float = 1
) -> str:
    """By how much a figure differs, from where to where, and how surely; `scale` is the unit's.

    The standard errors are taken to be independent. On the same text they are not, and a difference is surer than that.
    """
    x, y = getattr(a, name), getattr(b, name)
    if f"{x:{spec}}" == f"{y:{spec}}":
        return f"{same} ({x:{spec}})"
    error = math.hypot(*(measured.standard_error.get(name, math.nan) for measured in (a, b)))
    errors = abs(y - x) / error if error > 0 else None  # a NaN is not
    chance = ", maybe chance" if errors is not None and errors < NOISE else ""
    apart = "" if errors is None else f", {errors:.1f} standard errors apart{chance}"
    return f"{scale * abs(y - x):.3g} {less_more[y > x]} ({x:{spec}} → {y:{spec}}{apart})"


def _verdicts(a: Measured, b: Measured) -> str:
    if a.within_budget == b.within_budget:
        return f"Both are {'within' if a.within_budget else 'over'} the quality budget."
    if a.within_budget:
        return f"A is within the quality budget, B no longer is ({b.verdict})."
    return f"B is within the quality budget, which A was not ({a.verdict})."
