"""Why a profile has its region, window, refresh and warm-up: what else was tried, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ffnskip_cli.budget import NOISE, SEARCH_NOISE

if TYPE_CHECKING:
    from ffnskip.profiles.profile import Profile
    from ffnskip.profiles.schema import Candidate, Search, Skip, WarmUpTrial


def is_chosen(tried: Candidate | WarmUpTrial, skip: Skip) -> bool:
    """Whether the profile's rule is this one of those that were tried."""
    return all(getattr(skip, name) == value for name, value in tried if name in type(skip).model_fields)


def layers(start: int, end: int) -> str:
    """The layers [start, end) in words."""
    return f"layer {start}" if end - start == 1 else f"layers {start} to {end - 1}"


def explain_search(profile: Profile) -> Iterator[str]:
    """A sentence or two for each part of the search that tried more than one thing, the profile's own among them."""
    search, skip = profile.search, profile.skip
    if search is None:
        return
    candidate = next((tried for tried in search.candidates if is_chosen(tried, skip)), None)
    if candidate and len(search.candidates) > 1:
        yield _why_rule(search, candidate)
        yield _rivals(search, candidate)
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
    where = "the same layers" if _region(paper) == _region(chosen) else layers(*_region(paper))
    return (
        f"{tried} cost least: KL {chosen.kl:.3f}, against {paper.kl:.3f} for the paper's rule (no window) in {where}."
    )


def _rivals(search: Search, chosen: Candidate) -> str:
    close = sum(_close(tried, chosen) for tried in search.candidates if tried != chosen)
    how_many = "None of the others is" if close == 0 else "One other is" if close == 1 else f"{close} others are"
    return f"{how_many} within noise of it (three standard errors of the difference)."


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
    return f"{window}{refresh} in {layers(candidate.cold_s, candidate.cold_e)}"


def _close(tried: Candidate, chosen: Candidate) -> bool:
    return abs(tried.kl - chosen.kl) <= SEARCH_NOISE * tried.standard_error


def _region(candidate: Candidate) -> tuple[int, int]:
    return candidate.cold_s, candidate.cold_e
