"""Load a model as the options say, and a profile that fits it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from ffnskip.model.parts import refuse_without_parts
from ffnskip.model.types import refuse_type
from ffnskip.profiles.identity import shared_profile
from ffnskip.profiles.locate import is_auto
from ffnskip.profiles.profile import Profile
from ffnskip.rules import Rule, rule_named
from ffnskip_cli import console
from ffnskip_cli.commands.identity import check_identity
from ffnskip_cli.commands.options import ModelOptions, Move
from ffnskip_cli.sources.models import LoadedModel, load_model
from ffnskip_cli.sources.profiles import read_profile

if TYPE_CHECKING:
    from transformers import PretrainedConfig


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
