"""How two profiles differ, in sentences: A is the one that was, B the one that is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ffnskip_cli.report.explain_texts import text_name
from ffnskip_cli.report.rule_words import compensation_name, count, threshold_text

if TYPE_CHECKING:
    from ffnskip.profiles.profile import Profile
    from ffnskip.profiles.schema import (
        Compensation,
        EvaluationText,
        Fit,
        Measured,
        ModelInfo,
        Search,
        SimilarityCurve,
        Skip,
    )

_OPTIONAL = ("calibration", "evaluation", "similarity", "search", "fit", "measured", "curve")
# Of a text: said otherwise, or nothing new.
_NAMING = {"dataset", "config", "split", "text_sha256", "tokens_requested", "parts"}
_OTHERS = {
    "flops_saved": ("FLOPs saved", ".1%"),
    "never_skip_fraction": ("tokens that skip nothing", ".1%"),
    "top1_agreement": ("top-1 agreement", ".1%"),
    "perplexity": ("perplexity", ".4g"),
}
_CHANCE = 2.0  # standard errors


def sentences(a: Profile, b: Profile) -> list[str]:
    """What changed from `a` to `b`, the most important first, each sentence ending with a full stop."""
    return ["The profiles are identical."] if a == b else list(_sentences(a, b))


def _sentences(a: Profile, b: Profile) -> Iterator[str]:
    yield _models(a.model, b.model)
    if a.evaluation and b.evaluation:
        yield from _texts("measured", a.evaluation, b.evaluation)
        if a.evaluation.text_sha256 != b.evaluation.text_sha256:
            yield "So the figures that follow differ by their texts too, not only by the profiles."
    if a.measured and b.measured:
        yield from _figures(a.measured, b.measured)
    yield from _rule(a.skip, b.skip)
    yield from _instead(a.compensation, b.compensation)
    if a.search and b.search and a.search != b.search:
        old, new = _tried(a.search), _tried(b.search)
        yield f"The searches behind them differ: {f'both tried {new}' if old == new else f'{old} → {new}'}."
    if a.fit and b.fit and a.fit != b.fit:
        old, new = _fitted(a.fit), _fitted(b.fit)
        yield f"The fits behind them differ: {f'both had {new}' if old == new else f'{old} → {new}'}."
    if a.calibration and b.calibration:
        yield from _texts("calibrated", a.calibration, b.calibration)
    if a.similarity and b.similarity and a.model.n_layers == b.model.n_layers:
        yield from _similarity(a.similarity, b.similarity)
    for name in _OPTIONAL:
        if bool(getattr(a, name)) != bool(getattr(b, name)):
            yield f"Only {'A' if getattr(a, name) else 'B'} has the section `{name}`."
    if a.made_with != b.made_with:
        yield f"They were made with different versions: {_differing(a.made_with, b.made_with)}."


def _models(a: ModelInfo, b: ModelInfo) -> str:
    if a.id != b.id:
        return f"The profiles are for different models: A for {a.id}, B for {b.id}."
    differing = [name for name in type(a).model_fields if getattr(a, name) != getattr(b, name)]
    if differing:
        return f"Both are for a model named {a.id}, but B's is another: it differs in {', '.join(differing)}."
    return f"Both are for {a.id}."


def _figures(a: Measured, b: Measured) -> Iterator[str]:
    if a == b:
        return
    if a.goal != b.goal:
        yield f"The goal was {a.goal}, and is {b.goal}."
    skipped = _compared(a, b, "skip_ratio", ".1%", ("points fewer FFNs", "points more FFNs", "as many FFNs"), 100)
    cost = _compared(a, b, "kl", ".3g", ("nats per token less KL", "nats per token more KL", "as much KL"))
    yield f"B skips {skipped} and costs {cost}."
    moved = [
        f"{words} {_moved(getattr(a, name), getattr(b, name), spec)}"
        for name, (words, spec) in _OTHERS.items()
        if f"{getattr(a, name):{spec}}" != f"{getattr(b, name):{spec}}"
    ]
    if moved:
        yield f"Also {', '.join(moved)}."
    yield _verdicts(a, b)


def _compared(
    a: Measured, b: Measured, name: str, spec: str, less_more_same: tuple[str, str, str], scale: float = 1
) -> str:
    """By how much a figure differs, from where to where, and how surely; `scale` is the unit's."""
    less, more, same = less_more_same
    x, y = getattr(a, name), getattr(b, name)
    if f"{x:{spec}}" == f"{y:{spec}}":
        return f"{same} ({x:{spec}})"
    amount = f"{scale * abs(y - x):.3g} {more if y > x else less}"
    return f"{amount} ({x:{spec}} → {y:{spec}}{_in_errors(a, b, name)})"


def _in_errors(a: Measured, b: Measured, name: str) -> str:
    """The difference of a figure in standard errors, as if both were measured independently.

    On the same text they are not, and a difference is surer than this says.
    """
    if name not in a.standard_error or name not in b.standard_error:
        return ""
    error = math.hypot(a.standard_error[name], b.standard_error[name])
    if error == 0:
        return ""
    errors = abs(getattr(b, name) - getattr(a, name)) / error
    return f", {errors:.1f} standard errors apart{', maybe chance' if errors < _CHANCE else ''}"


def _verdicts(a: Measured, b: Measured) -> str:
    if a.within_budget == b.within_budget:
        return f"Both are {'within' if a.within_budget else 'over'} the quality budget."
    if a.within_budget:
        return f"A is within the quality budget, B no longer is ({b.verdict})."
    return f"B is within the quality budget, which A was not ({a.verdict})."


def _rule(a: Skip, b: Skip) -> Iterator[str]:
    if a.rule != b.rule:
        old, new = (f"{skip.rule} with a threshold of {threshold_text(skip)}" for skip in (a, b))
        yield f"The rule was {old}, and is {new}."
    elif a.threshold != b.threshold:
        unit = " nats" if b.rule == "predicted-damage" else ""
        yield f"The threshold {_moved(a.threshold, b.threshold, '')}{unit}."
    if (a.cold_s, a.cold_e) != (b.cold_s, b.cold_e):
        grown = (b.cold_e - b.cold_s) - (a.cold_e - a.cold_s)
        layers = f"by {count(abs(grown), 'layer')}"
        how = f"grew {layers}" if grown > 0 else f"shrank {layers}" if grown < 0 else "moved"
        yield f"The skip region {how}: [{a.cold_s}, {a.cold_e}) → [{b.cold_s}, {b.cold_e})."
    if a.warm_up != b.warm_up:
        yield f"The warm-up {_moved(a.warm_up, b.warm_up, '')} tokens."
    if a.window != b.window and a.rule == b.rule == "cosine":
        yield f"FFNs skipped after a trigger, at most: {a.window or 'all'} → {b.window or 'all'}."
    if a.refresh_every != b.refresh_every:
        yield f"Tokens until one runs dense again: {a.refresh_every or 'no end'} → {b.refresh_every or 'no end'}."


def _instead(a: Compensation, b: Compensation) -> Iterator[str]:
    old, new = compensation_name(a), compensation_name(b)
    if old != new:
        yield f"What is added in place of a skipped FFN: {old} → {new}."
    if a.sha256 is None or b.sha256 is None:
        return
    if a.sha256 != b.sha256:
        yield f"Their weights differ: {a.file} → {b.file}."
    elif a.file == b.file:
        yield f"They share one weights file, {a.file}."
    else:
        yield f"Their weights are the same, in files of two names: {a.file} → {b.file}."


def _tried(search: Search) -> str:
    warm_ups = count(len(search.warm_up), "warm-up")
    if not search.candidates:
        return f"{warm_ups} at ratio {search.ratio:g}"
    rules = count(len(search.candidates), "rule")
    return f"{rules} at ratio {search.ratio:g} on {search.tokens:,} tokens and {warm_ups}"


def _fitted(fit: Fit) -> str:
    kl = f" to KL {min(fit.kl):.3g}" if fit.kl else ""
    return f"{fit.tokens:,} tokens and {count(max(len(fit.kl) - 1, 0), 'refit')}{kl} at ratio {fit.ratio:g}"


def _texts(done: str, a: EvaluationText, b: EvaluationText) -> Iterator[str]:
    names = [text_name(text) for text in (a, b)]
    details = _differing(*(text.model_dump(exclude=_NAMING) for text in (a, b)))
    if names[0] != names[1]:
        what = f"on another text: {names[0]} → {names[1]}"
    elif a.text_sha256 != b.text_sha256:
        what = f"on other text of {names[0]}"
    elif details:
        what = f"on the same text of {names[0]}"
    else:
        return
    yield f"B was {done} {what}{details and f', with {details}'}."


def _similarity(a: SimilarityCurve, b: SimilarityCurve) -> Iterator[str]:
    if a.mean != b.mean:
        layer = max(range(len(a.mean)), key=lambda i: abs(b.mean[i] - a.mean[i]))
        yield f"The mean similarity changed most in layer {layer}: {a.mean[layer]:.4f} → {b.mean[layer]:.4f}."


def _moved(a: float, b: float, spec: str) -> str:
    return f"{'rose' if b > a else 'fell'} from {a:{spec}} to {b:{spec}}"


def _differing(a: Mapping[str, object], b: Mapping[str, object]) -> str:
    """`name a → b` for each entry that differs."""
    changed = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return ", ".join(f"{name} {_or_none(a.get(name))} → {_or_none(b.get(name))}" for name in changed)


def _or_none(value: object) -> object:
    return "none" if value is None else value
