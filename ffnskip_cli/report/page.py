"""A profile as a page of tables, with the names that its file uses; as HTML one file that holds the figure, too."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ffnskip.compensation.kinds import compensation_name
from ffnskip_cli.report import html
from ffnskip_cli.report.html import Section
from ffnskip_cli.report.tables import Column, Row
from ffnskip_cli.report.words import explain, is_chosen, threshold_title

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ffnskip.profiles.evidence import Candidate, EvaluationText, Fit, Measured, Search, WarmUpTrial
    from ffnskip.profiles.profile import Profile
    from ffnskip.profiles.schema import Compensation, Skip

_CHOSEN = Column("chosen", "")
_PERCENT = ".2%"
_FIGURES = {
    "target_ratio": _PERCENT,
    "target_flops": _PERCENT,
    "max_kl": ".4f",
    "max_perplexity_increase": _PERCENT,
    "skip_ratio": _PERCENT,
    "flops_saved": _PERCENT,
    "flops_saved_past_warm_up": _PERCENT,
    "least_skipped": _PERCENT,
    "never_skip_fraction": _PERCENT,
    "perplexity_dense": ".3f",
    "perplexity": ".3f",
    "kl": ".4f",
    "top1_agreement": _PERCENT,
}


def sections(profile: Profile) -> Iterator[Section]:
    """The tables of a profile, in reading order; a part that the profile lacks is left out."""
    yield Section("model", _fields(profile.model))
    yield Section("skip", _rule(profile.skip))
    yield Section("compensation", [row for row in _fields(profile.compensation) if row["value"]])
    if profile.calibration or profile.evaluation:
        yield from _texts(profile.calibration, profile.evaluation)
    if profile.search:
        yield from search_tables(profile.search, profile.skip)
    if profile.fit:
        yield from fit_tables(profile.fit, profile.compensation)
    if profile.measured:
        yield figures(profile.measured)
    if profile.curve:
        yield _curve(profile)
    yield Section("made with", [{"field": name, "value": version} for name, version in profile.made_with.items()])


def _fields(section: BaseModel) -> list[Row]:
    return [{"field": name, "value": value} for name, value in section.model_dump().items()]


def _rule(skip: Skip) -> list[Row]:
    """The settings that mean something under the rule, the threshold with its unit."""
    unit, fields = skip.by.unit, skip.model_dump(exclude=None if skip.by.has_window else {"window"})
    if unit:
        fields["threshold"] = f"{skip.threshold:g} {unit}"
    return [{"field": name, "value": value} for name, value in fields.items()]


def _texts(calibration: EvaluationText | None, evaluation: EvaluationText | None) -> Iterator[Section]:
    texts = {"calibration": calibration, "evaluation": evaluation}
    fields = {name: text.model_dump(exclude={"parts"}) if text else {} for name, text in texts.items()}
    rows: list[Row] = [
        {"field": field, **{name: short(values.get(field)) for name, values in fields.items()}}
        for field in {**fields["evaluation"], **fields["calibration"]}
    ]
    note = " ".join(_shortfall(name, text) for name, text in texts.items() if text)
    yield Section("text", rows, (html.FIELD, *(Column(name, name) for name in texts)), note.strip())
    for name, text in texts.items():
        if text and text.parts:
            parts: list[Row] = [{field: short(value) for field, value in part} for part in text.parts]
            yield Section(f"parts of the {name} text", parts, tuple(Column(field, field) for field in parts[0]))


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


def search_tables(search: Search, skip: Skip) -> Iterator[Section]:
    """What was tried before the rule's settings were chosen, the best first; what was chosen has a mark."""
    costs = (Column("kl", "kl (nats per token)", ".4f"), Column("standard_error", "± of the difference", ".4f"))
    if search.candidates:
        names = ("region", "window", "refresh_every")
        yield Section(
            f"rules tried at a ratio of {search.ratio:g} on {search.tokens:,} tokens",
            [
                {"region": f"[{tried.cold_s}, {tried.cold_e})"} | _tried(tried, skip)
                for tried in sorted(search.candidates, key=_kl)
            ],
            (*(Column(name, name) for name in names), *costs, _CHOSEN),
        )
    if search.warm_up:
        yield Section(
            "warm-ups tried",
            [_tried(trial, skip) for trial in sorted(search.warm_up, key=_kl)],
            (Column("warm_up", "warm_up"), *costs, Column("repetition", "repetition", _PERCENT), _CHOSEN),
        )


def fit_tables(fit: Fit, compensation: Compensation) -> Iterator[Section]:
    """How probe and compensation were fitted, and which compensations were tried before, the best first."""
    if fit.tried:
        chosen = compensation_name(compensation)
        yield Section(
            "compensations tried",
            [
                {
                    "compensation": (name := compensation_name(tried)),
                    **tried.model_dump(include={"skip_ratio", "flops_saved"}),
                    "chosen": "chosen" if name == chosen else "",
                }
                for tried in sorted(fit.tried, key=lambda tried: -tried.flops_saved)
            ],
            (
                Column("compensation", "compensation"),
                *(Column(name, name, _PERCENT) for name in ("skip_ratio", "flops_saved")),
                _CHOSEN,
            ),
        )
    stages = ["kl (dense fit)", *(f"kl (refit {number})" for number in range(1, len(fit.kl)))]
    rows: list[Row] = [{"field": name, "value": short(value)} for name, value in fit if name not in ("kl", "tried")]
    rows += [{"field": stage, "value": f"{kl:.4f}"} for stage, kl in zip(stages, fit.kl, strict=False)]
    yield Section("fit", rows)


def _kl(tried: Candidate | WarmUpTrial) -> float:
    return tried.kl


def _tried(tried: Candidate | WarmUpTrial, skip: Skip) -> dict[str, object]:
    return {**tried.model_dump(), "chosen": "chosen" if is_chosen(tried, skip) else ""}


def figures(measured: Measured) -> Section:
    """The table of what was asked for and what was measured."""
    rows: list[Row] = []
    for name, spec in _FIGURES.items():
        value = getattr(measured, name)
        if value is None:  # a goal that was not given
            continue
        error = measured.standard_error.get(name)
        shown = None if error is None else f"± {error:{spec}}"
        rows.append({"field": name, "value": f"{value:{spec}}", "error": shown})
    columns = (Column("field", "figure"), Column("value", "value", ">"), Column("error", "standard error", ">"))
    return Section(f"measured on {measured.tokens:,} tokens", rows, columns)


def _curve(profile: Profile) -> Section:
    columns = (
        Column("threshold", threshold_title(profile.skip), ".4g" if profile.skip.by.unit else ".4f"),
        Column("skip_ratio", "skip_ratio", _PERCENT),
        Column("kl", "kl (nats per token)", ".4f"),
    )
    return Section("other thresholds", [point._asdict() for point in profile.curve_by_ratio], columns)


def page(profile: Profile, svg: str, captions: Sequence[str]) -> str:
    """The page: the profile in words, the picture with its captions, and tables of figures and of what was tried."""
    title = f"Skip profile of {profile.model.id}"
    tables = [figures(profile.measured)] if profile.measured else []
    if profile.search:
        tables += search_tables(profile.search, profile.skip)
    if profile.fit:
        tables += fit_tables(profile.fit, profile.compensation)
    return html.document(
        title, [html.items(explain(profile)), html.picture(svg, title, captions), *map(html.table, tables)]
    )
