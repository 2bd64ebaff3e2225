"""Steps that several commands share."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ffnskip.errors import FfnskipError
from ffnskip.files import replacing
from ffnskip.model.parts import refuse_without_parts
from ffnskip.model.types import refuse_type
from ffnskip.profiles.identity import shared_profile
from ffnskip.profiles.locate import is_auto
from ffnskip.profiles.profile import Profile
from ffnskip.rules import Rule, rule_named
from ffnskip_cli import console
from ffnskip_cli.budget import MAX_KL
from ffnskip_cli.commands.identity import check_identity
from ffnskip_cli.commands.options import ModelOptions, Move
from ffnskip_cli.report.tables import json_text
from ffnskip_cli.sources.models import LoadedModel, load_model
from ffnskip_cli.sources.profiles import read_profile

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ffnskip.decoder import Decoder
    from ffnskip.profiles.evidence import EvaluationText
    from ffnskip_cli.calibration.lab import Step


def load(
    name: str,
    model_options: ModelOptions,
    rule: str | None = None,
    *,
    profiled: bool = True,
    gguf_as_is: bool = False,
) -> LoadedModel:
    """Load the model that the options name, saying so; with a rule, only one of a type that it can be used on.

    Where a profile of that rule exists, the model is made of the right parts, or it is not the profile's. With
    `gguf_as_is` a GGUF file is read as it is, unless the options ask for other weights.
    """
    as_loaded = (model_options.dtype, model_options.weights, model_options.device_map) == ("auto", "auto", None)
    refuse = None if rule is None else partial(_refuse, rule_named(rule), profiled)
    if model_options.threads is not None:
        torch.set_num_threads(model_options.threads)
    with console.busy(f"Loading {name}"):
        loaded = load_model(
            name,
            dtype=model_options.dtype,
            device=model_options.device,
            device_map=model_options.device_map,
            revision=model_options.revision,
            trust_remote_code=model_options.trust_remote_code,
            offline=model_options.offline,
            gguf_as_is=gguf_as_is and as_loaded,
            refuse=refuse,
        )
    if loaded.note is not None:
        console.talk.print(loaded.note, markup=False, highlight=False)
    if model_options.device_map is not None:
        console.talk.print(f"The model lies on {loaded.placement}.")
    return loaded


def _refuse(rule: Rule, profiled: bool, config: PretrainedConfig) -> None:
    """Raise UnsupportedModelError for a model that the rule cannot be used on, by its configuration."""
    refuse_type(config, needs_stream=rule.reads == "output")
    if rule.leaves_out_parts and not profiled:
        refuse_without_parts(config)


class Pair(NamedTuple):
    """A model, a profile that fits it, with the threshold asked for, and the name by which others find the profile."""

    loaded: LoadedModel
    profile: Profile
    profile_name: str


def load_pair(
    model: str,
    profile: str,
    move: Move,
    model_options: ModelOptions,
    *,
    other_weights: bool,
    gguf_as_is: bool = False,
    refuse: Callable[[Profile], object] = lambda profile: None,
) -> Pair:
    """Load a model and the profile of that name, or the one that `auto` stands for, saying which it is.

    `refuse` is shown the profile, before the model is loaded unless the profile depends on it. Raises FfnskipError for
    a profile that was made on another model, or on other weights and `other_weights` does not allow that.
    """

    def read(name: str | os.PathLike[str]) -> tuple[Profile, str]:
        found, located = read_profile(name, offline=model_options.offline, with_weights=True)
        found = found.moved(threshold=move.threshold, target=move.target)
        refuse(found)
        return found, located.name

    given = None if is_auto(profile) else read(profile)
    rule = None if given is None else given[0].skip.rule
    loaded = load(model, model_options, rule, gguf_as_is=gguf_as_is)
    chosen, name = given or read(shared_profile(loaded.model))
    check_identity(loaded, chosen, other_weights=other_weights, offline=model_options.offline)
    return Pair(loaded, chosen, name)


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
