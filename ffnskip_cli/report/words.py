"""A profile in plain sentences, for an engineer who did not read the paper.

What a rule does is said by the rule (`ffnskip.rules`), what a compensation adds by its kind (`ffnskip.compensation`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ffnskip.compensation.kinds import KINDS, compensation_name
from ffnskip_cli.budget import MAX_KL, NOISE, SEARCH_NOISE

if TYPE_CHECKING:
    from ffnskip.profiles.evidence import (
        CalibrationText,
        Candidate,
        CurvePoint,
        EvaluationText,
        Fit,
        Measured,
        NamedText,
        Search,
        WarmUpTrial,
    )
    from ffnskip.profiles.profile import Profile
    from ffnskip.profiles.schema import Compensation, Skip


def explain(profile: Profile) -> list[str]:
    """What the profile skips, saves and costs, and why it is as it is; what it has no data for is left out.

    Each sentence holds its own numbers. A figure with ± has its standard error behind it.
    """
    return list(_sentences(profile))


def text_name(text: EvaluationText) -> str:
    """`dataset:config:split` of a text, or those of a mixture's parts."""
    return f"a mixture of {_listed([_name(part) for part in text.parts])}" if text.parts else _name(text)


def kinds_of(text: EvaluationText) -> set[tuple[str, str | None]]:
    """The datasets and configurations of a text: equal sets are text of the same kinds."""
    return {(part.dataset, part.config) for part in text.parts or (text,)}


def is_chosen(tried: Candidate | WarmUpTrial, skip: Skip) -> bool:
    """Whether the profile has these settings, of those that were tried."""
    return all(getattr(skip, name) == value for name, value in tried if name in type(skip).model_fields)


def threshold_title(skip: Skip) -> str:
    """`threshold`, with its unit if the rule has one."""
    return f"threshold ({skip.by.unit})" if skip.by.unit else "threshold"


def _sentences(profile: Profile) -> Iterator[str]:
    yield from rule_sentences(profile)
    if profile.measured:
        yield from _figures(profile.measured, "unseen text" if _unseen(profile) else "text")
    if profile.search:
        yield from _choices(profile.search, profile.skip)
    if profile.fit:
        yield from _fitting(profile, profile.fit)
    if texts := _texts(profile):
        yield texts
    yield from _curve(profile.curve_by_ratio)


def rule_sentences(profile: Profile) -> Iterator[str]:
    """What it skips, and what is added instead."""
    skip, n_layers = profile.skip, profile.model.n_layers
    yield skip.by.sentence(skip, _layers(skip.cold_s, skip.cold_e))
    if skip.by.leaves_out_parts:
        yield f"What its channels are worth lies in the file {profile.compensation.file} beside the profile."
    elif profile.weight_shapes:
        yield _added(profile.compensation)
    cold = [_layers(start, end) for start, end in ((0, skip.cold_s), (skip.cold_e, n_layers)) if start < end]
    if cold:
        yield f"The FFNs of {_listed(cold)} (the cold regions) always run."
    tokens = "generated token" if skip.warm_up == 1 else f"{skip.warm_up} generated tokens"
    dense = f"The prompt and the first {tokens} (the warm-up) run" if skip.warm_up else "The prompt runs"
    refresh = f"; after that, one token in {skip.refresh_every} runs dense" if skip.refresh_every else ""
    yield f"{dense} dense{refresh}."


def _added(compensation: Compensation) -> str:
    what, where = KINDS[compensation.kind].words(compensation.rank), ""
    if compensation.neurons:
        what += f" plus {compensation.neurons:,} neuron{'s' * (compensation.neurons != 1)} of the FFN's own"
    if compensation.file is not None:
        weights = "the probes' weights" if compensation.kind == "none" else "the weights"
        where = f"; {weights} lie in the file {compensation.file} beside the profile"
    return f"In place of a skipped FFN's output {what} is added{where}."


def _figures(measured: Measured, text: str) -> Iterator[str]:
    errors = "; ± is one standard error" if measured.standard_error else ""
    limited = measured.max_kl is not None or measured.max_perplexity_increase is not None
    held = " The limit was made to hold on this very text." if limited else ""
    share = "skipped FFNs / all FFNs" if measured.least_skipped is None else "FLOPs of FFNs left out / all of them"
    yield (
        f"The goal was {measured.goal}; past the warm-up, {measured.tokens:,} tokens of {text} gave "
        f"{_reached(measured)} ({share}{errors}).{held}"
    )
    flops, never = measured.flops_saved, measured.never_skip_fraction
    what = f"saves {flops:.1%} of a decode's FLOPs" if flops >= 0 else f"costs {-flops:.1%} more FLOPs in a decode"
    yield f"It {what}, warm-up and all overhead charged."
    if measured.least_skipped is not None:
        yield f"In the worst case, a token past the warm-up leaves out {measured.least_skipped:.1%} of its FFNs' FLOPs."
    elif never:
        yield f"The worst case saves nothing: {never:.1%} of the tokens past the warm-up skip no FFN at all."
    else:
        yield "Every token past the warm-up skips at least one FFN."
    yield (
        f"It costs KL {figure(measured, 'kl')} nats per token from the dense model: perplexity goes from "
        f"{measured.perplexity_dense:.4g} to {figure(measured, 'perplexity', '.4g', '.2g')}, and the most likely "
        f"token is the same at {figure(measured, 'top1_agreement', '.1%', '.1%')} of positions (top-1 agreement)."
    )
    yield f"Verdict: {measured.verdict.rstrip('.')}."


def _reached(measured: Measured) -> str:
    """What the goal is held against, and the ratio."""
    ratio = f"a ratio of {figure(measured, 'skip_ratio')}"
    if measured.max_kl is not None:
        return f"KL {figure(measured, 'kl')} at {ratio}"
    if measured.max_perplexity_increase is not None and measured.perplexity_dense > 0:
        increase = measured.perplexity / measured.perplexity_dense - 1
        return f"perplexity {abs(100 * increase):.3g}% {'down' if increase < 0 else 'up'} at {ratio}"
    return ratio


def figure(measured: Measured, name: str, spec: str = ".3f", error_spec: str = ".3f") -> str:
    """A figure, with its standard error if the profile has one."""
    error = measured.standard_error.get(name)
    shown = f"{getattr(measured, name):{spec}}"
    return shown if error is None else f"{shown} ± {error:{error_spec}}"


def _choices(search: Search, skip: Skip) -> Iterator[str]:
    """Why the rule has its settings, where more than one was tried and the profile's are among them."""
    candidate = next((tried for tried in search.candidates if is_chosen(tried, skip)), None)
    if candidate and len(search.candidates) > 1:
        yield _why_rule(search, candidate)
        close = sum(_close(tried, candidate) for tried in search.candidates if tried != candidate)
        how_many = "None of the others is" if close == 0 else "One other is" if close == 1 else f"{close} others are"
        yield f"{how_many} within noise of it (three standard errors of the difference)."
    trial = next((tried for tried in search.warm_up if is_chosen(tried, skip)), None)
    if trial and len(search.warm_up) > 1:
        yield _why_warm_up(search, trial)


def _why_rule(search: Search, chosen: Candidate) -> str:
    best = min(search.candidates, key=lambda tried: tried.kl)
    tried = (
        f"Of {len(search.candidates)} rules tried at a ratio of {search.ratio:g} on {search.tokens:,} tokens of the "
        f"calibration text, {_described(chosen)}"
    )
    if chosen.kl > best.kl:
        noise = ", which is within noise (three standard errors)" if _close(best, chosen) else ""
        lowest = f"against {best.kl:.3f} for the lowest, {_described(best)}{noise}"
        return f"{tried} was chosen: KL {chosen.kl:.3f}, {lowest}."
    papers = [tried for tried in search.candidates if tried.window is None and not tried.refresh_every]
    paper = min(papers, key=lambda tried: (_region(tried) != _region(chosen), tried.kl), default=chosen)
    if paper == chosen:
        return f"{tried} cost least: KL {chosen.kl:.3f}."
    where = "the same layers" if _region(paper) == _region(chosen) else _layers(*_region(paper))
    return (
        f"{tried} cost least: KL {chosen.kl:.3f}, against {paper.kl:.3f} for the paper's rule (no window) in {where}."
    )


def _why_warm_up(search: Search, chosen: WarmUpTrial) -> str:
    best = min(search.warm_up, key=lambda tried: tried.kl)
    within_noise = [tried for tried in search.warm_up if tried.kl - best.kl <= NOISE * tried.standard_error]
    lowest = "the lowest" if chosen == best else f"against {best.kl:.3f} for the best, {best.warm_up}"
    if chosen == min(within_noise, key=lambda tried: tried.warm_up):
        return (
            f"The warm-up of {chosen.warm_up} is the smallest of the {len(search.warm_up)} tried that is within noise "
            f"(two standard errors) of the best: KL {chosen.kl:.3f}, {lowest}."
        )
    return f"Of {len(search.warm_up)} warm-ups tried, {chosen.warm_up} was chosen: KL {chosen.kl:.3f}, {lowest}."


def _described(candidate: Candidate) -> str:
    window = f"window {candidate.window}" if candidate.window else "no window"
    refresh = f", one token in {candidate.refresh_every} dense," if candidate.refresh_every else ""
    return f"{window}{refresh} in {_layers(*_region(candidate))}"


def _close(tried: Candidate, chosen: Candidate) -> bool:
    return abs(tried.kl - chosen.kl) <= SEARCH_NOISE * tried.standard_error


def _region(candidate: Candidate) -> tuple[int, int]:
    return candidate.cold_s, candidate.cold_e


def _fitting(profile: Profile, fit: Fit) -> Iterator[str]:
    name = compensation_name(profile.compensation)
    tried = {compensation_name(compensation): compensation.flops_saved for compensation in fit.tried}
    if name in tried and len(tried) > 1:
        yield (
            f"Of {len(tried)} compensations tried, {name} saves most at the KL that is allowed: {tried[name]:.1%} of a "
            "token's FLOPs, estimated from dense fits on text that was held back."
        )
    probes, compensation = profile.skip.by.reads == "input", KINDS[profile.compensation.kind].adds
    fitted = "Probes and compensation were" if compensation else "The probes were"
    fitted = fitted if probes else "The compensation was"
    yield f"{fitted} fitted to {fit.tokens:,} tokens of the calibration text's datasets{_course(fit)}."


def _course(fit: Fit) -> str:
    """The KL after each stage; the fit stops at the first refit that is not clearly better, and leaves that one out."""
    if not fit.kl:
        return ""
    dense, *refits = (f"{kl:.3g}" for kl in fit.kl)
    course = f": at a ratio of {fit.ratio:g}, on text that was held back, KL was {dense} after the dense fit"
    if not refits:
        return course
    dropped = "; the best was kept" if fit.kl[-1] > min(fit.kl) else ""
    how_many = "the refit" if len(refits) == 1 else "the refits"
    return f"{course}, and {_listed(refits)} after {how_many} to the skipping model{dropped}"


def _texts(profile: Profile) -> str | None:
    """What the profile was calibrated and measured on, and whether that is text of one kind."""
    calibration, evaluation = profile.calibration, profile.evaluation
    if calibration and evaluation:
        relation = _relation(profile, kinds_of(calibration), kinds_of(evaluation))
        return f"It was calibrated on {recorded(calibration)} and measured on {counted(evaluation)}: {relation}."
    if calibration:
        return f"It was calibrated on {recorded(calibration)}."
    return f"It was measured on {counted(evaluation)}." if evaluation else None


def _relation(profile: Profile, a: set[tuple[str, str | None]], b: set[tuple[str, str | None]]) -> str:
    if not _unseen(profile):
        return "the very same text, so the figures are not those of unseen text"
    if a == b:
        kinds = "the same kinds of text" if len(a) > 1 else "text of one kind"
        return f"{kinds}, so the figures say nothing about others"
    if {dataset for dataset, _ in a} & {dataset for dataset, _ in b}:
        return "texts that share a dataset only in part"
    return "text of another kind"


def _unseen(profile: Profile) -> bool:
    """Whether the profile says that it was measured on another text than it was calibrated on."""
    calibration, evaluation = profile.calibration, profile.evaluation
    return bool(calibration and evaluation and calibration.text_sha256 != evaluation.text_sha256)


def recorded(text: CalibrationText) -> str:
    """A calibration text in words, with its tokens or that the model wrote it."""
    return f"what the model itself wrote on from {text_name(text)}" if text.on == "generated" else counted(text)


def counted(text: EvaluationText) -> str:
    """A text in words, with its tokens."""
    parts = [f"{_name(part)} ({part.tokens_used:,})" for part in text.parts]
    return f"{text.tokens_used:,} tokens of {f'a mixture of {_listed(parts)}' if parts else _name(text)}"


def _name(text: NamedText) -> str:
    return ":".join(filter(None, (text.dataset, text.config, text.split)))


def _curve(points: Sequence[CurvePoint]) -> Iterator[str]:
    if len(points) > 1:
        lowest, highest = points[0].skip_ratio, points[-1].skip_ratio
        # Rounded inwards, so that --target takes both ends.
        low, high = math.ceil(round(100 * lowest, 9)) / 100, math.floor(round(100 * highest, 9)) / 100
        if low >= high:
            low, high = lowest, highest
        yield f"--target moves the ratio between {low} and {high} without a new calibration."
    for below, above in pairwise(points):
        if below.kl <= MAX_KL < above.kl:
            share = (MAX_KL - below.kl) / (above.kl - below.kl)
            yield (
                f"On its curve, KL {MAX_KL:g} lies at a ratio of about "
                f"{below.skip_ratio + share * (above.skip_ratio - below.skip_ratio):.2g}. That is the limit on KL "
                "alone: the quality budget has one on top-1 agreement, too, of which a curve says nothing."
            )
            return


def _layers(start: int, end: int) -> str:
    return f"layer {start}" if end - start == 1 else f"layers {start} to {end - 1}"


def _listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
