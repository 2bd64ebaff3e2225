"""Steps that several commands share."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnskip.errors import FfnskipError
from ffnskip.files import replacing
from ffnskip_cli import console
from ffnskip_cli.budget import MAX_KL
from ffnskip_cli.commands.options import Move
from ffnskip_cli.report.tables import json_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnskip.decoder import Decoder
    from ffnskip.profiles.evidence import EvaluationText
    from ffnskip.profiles.profile import Profile
    from ffnskip_cli.calibration.lab import Step


def say_path(decoder: Decoder) -> None:
    """Say when decoding is slower than it could be, and why."""
    if decoder.why_general is not None:
        console.talk.print(f"Decoding by the general path: {decoder.why_general}", highlight=False)


def announce(steps: Sequence[Step]) -> None:
    """Say what is going to run."""
    planned = [f"{step.name} ({step.passes or step.decode_steps})" for step in steps]
    console.talk.print(f"Forward passes at most: {', '.join(planned)}.", markup=False)


def warn_of_shortfall(which: str, text: EvaluationText) -> None:
    """Say so if a text, or some of a mixture, had fewer whole sequences than were asked for."""
    if text.fell_short:
        names = " + ".join(part.dataset for part in text.parts) or text.dataset
        console.warn(
            f"{text.tokens_requested} tokens of {which} text were asked for, and {names} has only {text.tokens_used}."
        )


def refuse_longer(model: PreTrainedModel, tokens: int, remedy: str) -> None:
    """Raise FfnskipError for sequences beyond the model's positions: an index error in some models, noise in others."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and tokens > most:
        raise FfnskipError(f"The model takes at most {most} tokens, but this needs {tokens}: {remedy}.")


def warn_if_over_budget(profile: Profile, name: object = "This profile") -> None:
    """Repeat the verdict of a profile that costs more quality than it should."""
    if profile.measured is not None and not profile.measured.within_budget:
        console.warn(f"{name} is {profile.measured.verdict}.")


def say_expected_cost(profile: Profile, move: Move) -> None:
    """Warn of a profile that costs too much, as far as it knows what it costs at the threshold or target asked for."""
    if move.target is not None:
        _say_cost_at(profile, move.target)
    elif move.threshold is None:
        warn_if_over_budget(profile)


def _say_cost_at(profile: Profile, target: float) -> None:
    kl = profile.point_at(target).kl
    if kl > MAX_KL:
        console.warn(
            f"At ratio {target:g} this profile is over the quality budget: by its curve KL {kl:.3f} is over "
            f"{MAX_KL:.3f} nats per token."
        )
        return
    console.talk.print(
        f"At ratio {target:g} the profile should cost KL {kl:.3f} nats per token, by its curve, which knows KL alone."
    )
    # The curve knows KL alone; the verdict may rest on top-1 agreement, and skipping more does not mend that.
    if profile.measured is not None and target >= profile.measured.skip_ratio:
        warn_if_over_budget(profile, f"Already at ratio {profile.measured.skip_ratio:g} this profile")


def warn_of_slower_profile(where: str, figures: str) -> None:
    """Tell users of a profile that costs them time."""
    console.warn(
        f"{where} decoding with the profile is slower than dense ({figures}): it skips too little there to pay for "
        "what it adds."
    )


def is_page(output: Path | None) -> bool:
    """Whether a result is to be written as a page, and not as JSON."""
    return output is not None and output.suffix.lower() == ".html"


def write_result(document: Mapping[str, Any], path: Path, page: Callable[[], str]) -> None:
    """Write a result to a file, whole or not at all, as JSON or as its page, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(page() if is_page(path) else json_text(document) + "\n", encoding="utf-8")
    console.talk.print(f"Wrote {path}.", markup=False)


def hint_command(*arguments: object) -> None:
    """Name the next command, ready to be pasted into a shell."""
    console.hint(shlex.join(["ffnskip", *map(str, arguments)]))
