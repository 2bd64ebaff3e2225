"""When a profile skips, what it adds instead, and how that was fitted, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ffnskip_cli.report.explain_search import layers
from ffnskip_cli.report.explain_texts import listed
from ffnskip_cli.report.rule_words import compensation_name, count, threshold_text

if TYPE_CHECKING:
    from ffnskip.profiles.profile import Profile
    from ffnskip.profiles.schema import Compensation, Fit, Skip


def explain_rule(profile: Profile) -> Iterator[str]:
    """A sentence each for the rule, the compensation, the cold regions and the warm-up."""
    skip, n_layers = profile.skip, profile.model.n_layers
    if skip.rule == "predicted-damage":
        yield (
            f"In {layers(skip.cold_s, skip.cold_e)}, each feed-forward block (FFN) is skipped for a token when a probe "
            f"on the FFN's own input predicts that this does less than {threshold_text(skip)} of damage."
        )
    else:
        yield _by_similarity(skip)
    if profile.weight_shapes:
        yield _instead(profile.compensation)
    cold = [layers(start, end) for start, end in ((0, skip.cold_s), (skip.cold_e, n_layers)) if start < end]
    if cold:
        yield f"The FFNs of {listed(cold)} (the cold regions) always run."
    tokens = "generated token" if skip.warm_up == 1 else f"{skip.warm_up} generated tokens"
    dense = f"The prompt and the first {tokens} (the warm-up) run" if skip.warm_up else "The prompt runs"
    refresh = f"; after that, one token in {skip.refresh_every} runs dense" if skip.refresh_every else ""
    yield f"{dense} dense{refresh}."


def explain_fit(profile: Profile) -> Iterator[str]:
    """What the fit did, and which compensations were compared before."""
    if (fit := profile.fit) is None:
        return
    yield from _why_compensation(profile.compensation, fit)
    probe, compensation = profile.skip.rule == "predicted-damage", profile.compensation.kind != "none"
    fitted = "Probes and compensation" if probe and compensation else "The probes" if probe else "The compensation"
    was = "was" if fitted == "The compensation" else "were"
    yield f"{fitted} {was} fitted to {fit.tokens:,} tokens of the calibration text's datasets{_course(fit)}."


def _by_similarity(skip: Skip) -> str:
    following = {None: "all later FFNs of these layers are", 1: "the next FFN is"}
    skipped = following.get(skip.window, f"the next {skip.window} FFNs of these layers are")
    return (
        f"In {layers(skip.cold_s, skip.cold_e)}, once a feed-forward block (FFN) turns a token's residual stream so "
        f"little that cos(h, h + FFN(h)) is at least {threshold_text(skip)}, {skipped} skipped for this token."
    )


def _instead(compensation: Compensation) -> str:
    what, where = _added(compensation), ""
    if compensation.file is not None:
        weights = "the probes' weights" if compensation.kind == "none" else "the weights"
        where = f"; {weights} lie in the file {compensation.file} beside the profile"
    return f"In place of a skipped FFN's output {what} is added{where}."


def _added(compensation: Compensation) -> str:
    neurons = f" plus {count(compensation.neurons, 'neuron')} of the FFN's own" if compensation.neurons else ""
    match compensation.kind:
        case "none":
            return "nothing"
        case "mean":
            return "its mean"
        case "linear":
            return f"a linear map of the FFN's input{neurons}"
        case _:
            return f"an affine map of rank {compensation.rank} of the FFN's input{neurons}"


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
    return f"{course}, and {listed(refits)} after {how_many} to the skipping model{dropped}"


def _why_compensation(chosen: Compensation, fit: Fit) -> Iterator[str]:
    name = compensation_name(chosen)
    tried = {compensation_name(one): one.flops_saved for one in fit.tried}
    if name in tried and len(tried) > 1:
        yield (
            f"Of {count(len(tried), 'compensation')} tried, {name} saves most at the KL that is allowed: "
            f"{tried[name]:.1%} of a token's FLOPs, estimated from dense fits on text that was held back."
        )
