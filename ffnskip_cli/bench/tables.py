"""The paper's tables about one profile, each from a command of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ffnskip.decoder import Decoder
from ffnskip.errors import FfnskipError
from ffnskip.model.sites import input_device
from ffnskip.profiles.profile import Profile
from ffnskip_cli.bench.never_skip import never_skipping
from ffnskip_cli.bench.suite import Plan, run_suite
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.rules.base import ablate, lengths
from ffnskip_cli.calibration.threshold.move import Mover
from ffnskip_cli.opponents import Field
from ffnskip_cli.opponents.similarity import as_printed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAPER_THRESHOLD = 0.9  # of its Table 6
_SAMPLE = 4  # sequences that thresholds of a sweep are solved on


def sweep(
    lab: Lab,
    profile: Profile,
    text: Tensor,
    savings: Sequence[float],
    plan: Plan,
    *,
    timed_text: Tensor | None = None,
    original: PreTrainedModel | None = None,
) -> Iterator[dict[str, Any]]:
    """Table 4: at each share of the FLOPs saved past warm-up, the threshold and the rows of `run_suite`, or why none.

    Args:
        lab: with the dense model.
        profile: to be moved; the wanted shares are solved on the first sequences of the text.
        text, timed_text, original: as for `run_suite`.
        savings: to be reached.
        plan: what to measure at each.
    """
    plan.refuse_short(profile.skip.warm_up)
    mover = Mover(lab, profile, text[:_SAMPLE])
    for saved in savings:
        try:
            moved = mover.saving(saved)
        except FfnskipError as error:
            yield {"target": saved, "threshold": None, "missing": str(error), "rows": []}
            continue
        decoder = Decoder(lab.model, moved, other_weights=True)
        rows = run_suite(lab.model, decoder, text, plan, lab.track, timed_text=timed_text, original=original)
        yield {"target": saved, "threshold": moved.skip.threshold, "missing": None, "rows": rows}


def worst_case(lab: Lab, profile: Profile, text: Tensor, prompts: Tensor, until: Sequence[int]) -> list[dict[str, Any]]:
    """Table 6: rows of `never_skipping`, of the profile and of the paper's rule with its threshold.

    Args:
        lab: with the dense model.
        profile: whose warm-up both have.
        text: ``[sequences, length]`` that the paper's region is found on, unless the profile's rule is the paper's.
        prompts: ``[prompts, length]``.
        until: numbers of generated tokens.
    """
    field = Field(lab, profile, 0.0, text[:_SAMPLE])
    if profile.skip.rule == "cosine":  # in the region that was chosen for it
        printed = field.bare(cold_s=profile.skip.cold_s, cold_e=profile.skip.cold_e, threshold=PAPER_THRESHOLD)
    else:
        printed = as_printed(field, PAPER_THRESHOLD)
    rows = []
    for name, one in (("profile", profile), ("paper", printed)):
        decoder = Decoder(lab.model, one, other_weights=True)
        found = never_skipping(decoder, prompts.to(input_device(lab.model)), until, lab.track)
        rows += [{"name": name, "rule": one.skip.rule, "threshold": one.skip.threshold} | row for row in found]
    return rows


def warm_ups(lab: Lab, profile: Profile, text: Tensor, tried: Sequence[int]) -> list[dict[str, Any]]:
    """Figure 5: for each warm-up, KL on the dense model's own continuations of prompts, and how the profile's repeat.

    Args:
        lab: with the dense model.
        profile: all of it but the warm-up is kept.
        text: ``[sequences, length]``, which begin with the prompts.
        tried: the warm-ups.

    Raises:
        FfnskipError: a warm-up is longer than the half of the continuations that is not scored.
    """
    _, generated = lengths(text.shape[1])
    if tried[-1] > generated // 2:
        raise FfnskipError(
            f"A warm-up of {tried[-1]} leaves nothing to compare in continuations of {generated} tokens, of which the "
            f"second half is scored: try at most {generated // 2}."
        )
    return [trial.model_dump() for trial in ablate(lab, profile, text, tried)]
