"""How two profiles differ, field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ffnskip_cli.report.summary import short
from ffnskip_cli.report.tables import Column, Row

if TYPE_CHECKING:
    from ffnskip.profiles.profile import Profile

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
