"""A profile in plain sentences, for an engineer who did not read the paper."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from ffnskip_cli.budget import MAX_KL
from ffnskip_cli.report.explain_rule import explain_fit, explain_rule
from ffnskip_cli.report.explain_search import explain_search
from ffnskip_cli.report.explain_texts import explain_texts, unseen
from ffnskip_cli.report.rule_words import by_ratio

if TYPE_CHECKING:
    from ffnskip.profiles.profile import Profile
    from ffnskip.profiles.schema import CurvePoint, Measured


def explain(profile: Profile) -> list[str]:
    """What the profile skips, saves and costs, and why it is as it is; what it has no data for is left out.

    Each sentence holds its own numbers. A figure with ± has its standard error behind it.
    """
    return list(_sentences(profile))


def _sentences(profile: Profile) -> Iterator[str]:
    yield from explain_rule(profile)
    if profile.measured:
        yield _reached(profile.measured, "unseen text" if unseen(profile) else "text")
        yield from _saved(profile.measured)
        yield _cost(profile.measured)
        yield f"Verdict: {profile.measured.verdict.rstrip('.')}."
    yield from explain_search(profile)
    yield from explain_fit(profile)
    if texts := explain_texts(profile):
        yield texts
    points = by_ratio(profile)
    if len(points) > 1:
        yield _range(points[0].skip_ratio, points[-1].skip_ratio)
    for below, above in pairwise(points):
        if below.kl <= MAX_KL < above.kl:
            ratio = _crossing(below, above)
            yield (
                f"On its curve, KL {MAX_KL:g} lies at a ratio of about {ratio:.2g}. That is the limit on KL alone: the "
                "quality budget has one on top-1 agreement, too, of which a curve says nothing."
            )
            break


def _reached(measured: Measured, text: str) -> str:
    ratio = f"a ratio of {_figure(measured, 'skip_ratio')}"
    if measured.max_kl is not None:
        reached = f"KL {_figure(measured, 'kl')} at {ratio}"
    elif measured.max_perplexity_increase is not None and measured.perplexity_dense > 0:
        increase = measured.perplexity / measured.perplexity_dense - 1
        reached = f"perplexity {abs(100 * increase):.3g}% {'down' if increase < 0 else 'up'} at {ratio}"
    else:
        reached = ratio
    errors = "; ± is one standard error" if measured.standard_error else ""
    return (
        f"The goal was {measured.goal}; past the warm-up, {measured.tokens:,} tokens of {text} gave {reached} "
        f"(skipped FFNs / all FFNs{errors})."
        + ("" if measured.target_ratio is not None else " The limit was made to hold on this very text.")
    )


def _saved(measured: Measured) -> Iterator[str]:
    flops, never = measured.flops_saved, measured.never_skip_fraction
    what = f"saves {flops:.1%} of a decode's FLOPs" if flops >= 0 else f"costs {-flops:.1%} more FLOPs in a decode"
    yield f"It {what}, warm-up and all overhead charged."
    if never:
        yield f"The worst case saves nothing: {never:.1%} of the tokens past the warm-up skip no FFN at all."
    else:
        yield "Every token past the warm-up skips at least one FFN."


def _cost(measured: Measured) -> str:
    perplexity = _figure(measured, "perplexity", ".4g", ".2g")
    return (
        f"It costs KL {_figure(measured, 'kl')} nats per token from the dense model: perplexity goes from "
        f"{measured.perplexity_dense:.4g} to {perplexity}, and the most likely token is the same at "
        f"{_figure(measured, 'top1_agreement', '.1%', '.1%')} of positions (top-1 agreement)."
    )


def _figure(measured: Measured, name: str, spec: str = ".3f", error_spec: str = ".3f") -> str:
    """A figure, with its standard error if the profile has one."""
    error = measured.standard_error.get(name)
    shown = f"{getattr(measured, name):{spec}}"
    return shown if error is None else f"{shown} ± {error:{error_spec}}"


def _range(lowest: float, highest: float) -> str:
    """Rounded inwards, so that --target takes both ends."""
    low, high = math.ceil(round(100 * lowest, 9)) / 100, math.floor(round(100 * highest, 9)) / 100
    if low >= high:
        low, high = lowest, highest
    return f"--target moves the ratio between {low} and {high} without a new calibration."


def _crossing(below: CurvePoint, above: CurvePoint) -> float:
    share = (MAX_KL - below.kl) / (above.kl - below.kl)
    return below.skip_ratio + share * (above.skip_ratio - below.skip_ratio)
