"""A profile as a page of tables, with the names that its file uses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ffnskip_cli.report.tables import Column, Row

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ffnskip.profile import Profile
    from ffnskip.sections import EvaluationText, Measured

_FIELD, _VALUE = Column("field", ""), Column("value", "")
_PERCENT = ".2%"
_FIGURES = {
    "target_ratio": _PERCENT,
    "skip_ratio": _PERCENT,
    "flops_saved": _PERCENT,
    "never_skip_fraction": _PERCENT,
    "perplexity_dense": ".3f",
    "perplexity": ".3f",
    "kl": ".4f",
    "top1_agreement": _PERCENT,
}


@dataclass(frozen=True)
class Section:
    """One table of the page, and what there is to say below it."""

    title: str
    rows: list[Row]
    columns: tuple[Column, ...] = (_FIELD, _VALUE)
    note: str = ""


def sections(profile: Profile) -> Iterator[Section]:
    """The tables of a profile, in reading order; a part that the profile lacks is left out."""
    yield Section("model", _fields(profile.model))
    yield Section("skip", _fields(profile.skip))
    yield Section("compensation", _fields(profile.compensation))
    if profile.calibration or profile.evaluation:
        yield _texts(profile.calibration, profile.evaluation)
    if profile.measured:
        yield figures(profile.measured)
    if profile.curve:
        yield _curve(profile)
    yield Section("made with", [{"field": name, "value": version} for name, version in profile.made_with.items()])


def _fields(section: BaseModel) -> list[Row]:
    return [{"field": name, "value": value} for name, value in section.model_dump().items()]


def _texts(calibration: EvaluationText | None, evaluation: EvaluationText | None) -> Section:
    texts = {"calibration": calibration, "evaluation": evaluation}
    fields = {name: text.model_dump() if text else {} for name, text in texts.items()}
    rows: list[Row] = [
        {"field": field, **{name: short(values.get(field)) for name, values in fields.items()}}
        for field in {**fields["evaluation"], **fields["calibration"]}
    ]
    note = " ".join(_shortfall(name, text) for name, text in texts.items() if text)
    return Section("text", rows, (_FIELD, *(Column(name, name) for name in texts)), note.strip())


def short(value: object) -> object:
    """Two full hashes side by side are wider than a terminal; who needs all digits finds them in the file."""
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", value):
        return f"{value[:16]}…"
    return value


def _shortfall(name: str, text: EvaluationText) -> str:
    if not text.fell_short:
        return ""
    counts = f"{text.tokens_used:,} of the {text.tokens_requested:,} tokens that were asked for"
    return f"The {name} text yielded only {counts}, so what was measured on it is less certain."


def figures(measured: Measured) -> Section:
    """The table of what was measured, with the verdict below it."""
    rows: list[Row] = []
    for name, spec in _FIGURES.items():
        error = measured.standard_error.get(name)
        shown = None if error is None else f"± {error:{spec}}"
        rows.append({"field": name, "value": f"{getattr(measured, name):{spec}}", "error": shown})
    columns = (Column("field", "figure"), Column("value", "value", ">"), Column("error", "standard error", ">"))
    return Section(f"measured on {measured.tokens:,} tokens", rows, columns, f"Verdict: {measured.verdict}")


def _curve(profile: Profile) -> Section:
    columns = (
        Column("threshold", "threshold", ".4f"),
        Column("skip_ratio", "skip_ratio", _PERCENT),
        Column("kl", "kl (nats per token)", ".4f"),
    )
    return Section("other thresholds", [point._asdict() for point in profile.curve], columns)
