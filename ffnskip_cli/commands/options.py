"""Arguments and options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ffnskip.errors import FfnskipError
from ffnskip_cli import console
from ffnskip_cli.budget import MAX_KL

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnskip.decoder import Decoder
    from ffnskip.profiles.profile import Profile
    from ffnskip_cli.sources.models import LoadedModel

Format = Literal["table", "json", "md", "csv"]
Weights = Literal["auto", "int8", "int4"]

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A Hub id (org/name, org/name@revision), a local folder, a .gguf file, or `demo`."
    ),
]
PrintFormat = Annotated[Format, typer.Option(help="How to print the result.")]


@dataclass(frozen=True)
class Move:
    """Another threshold than the profile's."""

    threshold: Annotated[
        float | None, typer.Option(metavar="X", help="Use this threshold instead of the profile's.")
    ] = None
    target: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            help="Skip this share of all FFNs, as on the profile's held-out text: moves the threshold along its curve.",
        ),
    ] = None

    def of(self, profile: Path) -> Profile:
        """The profile of that file, with that threshold."""
        from ffnskip.profiles.profile import load_profile

        return load_profile(profile).moved(threshold=self.threshold, target=self.target)


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded."""

    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="auto (as stored), float32, bfloat16 or float16.")] = (
        "auto"
    )
    weights: Weights = "auto"
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto (cuda if there is one), cpu, cuda:1, …")] = "auto"
    device_map: Annotated[
        str | None,
        typer.Option(
            metavar="MAP",
            help="auto spreads the model over all devices and the CPU, by accelerate; also balanced, sequential.",
        ),
    ] = None
    revision: Annotated[str | None, typer.Option(metavar="REVISION", help="Commit, branch or tag on the Hub.")] = None
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code/--no-trust-remote-code", help="Run Python code that comes with the model."),
    ] = False
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is cached already.")] = False


@dataclass(frozen=True)
class PackedModelOptions(ModelOptions):
    """How a model is loaded that may then be packed."""

    weights: Annotated[
        Weights,
        typer.Option(
            help="Format of the weight matrices: auto (as loaded); int8, fast at little loss; int4, the least memory."
        ),
    ] = "auto"


def load(name: str, model_options: ModelOptions) -> LoadedModel:
    """Load the model that the options name, saying so."""
    with console.busy(f"Loading {name}"):
        from ffnskip_cli.sources.models import load_model

        loaded = load_model(
            name,
            dtype=model_options.dtype,
            device=model_options.device,
            device_map=model_options.device_map,
            revision=model_options.revision,
            trust_remote_code=model_options.trust_remote_code,
            offline=model_options.offline,
        )
    if model_options.device_map is not None:
        console.talk.print(f"The model lies on {loaded.placement}.")
    return loaded


def say_path(decoder: Decoder) -> None:
    """Say when decoding is slower than it could be, and why."""
    if decoder.why_general is not None:
        console.talk.print(f"Decoding by the general path: {decoder.why_general}", highlight=False)


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
            f"{MAX_KL:.3f} nats per token; expect visibly worse text."
        )
        return
    console.talk.print(
        f"At ratio {target:g} the profile should cost KL {kl:.3f} nats per token, by its curve, which knows KL alone."
    )
    # The curve knows KL alone; the verdict may rest on top-1 agreement, and skipping more does not mend that.
    if profile.measured is not None and target >= profile.measured.skip_ratio:
        warn_if_over_budget(profile, f"Already at ratio {profile.measured.skip_ratio:g} this profile")


def hint_command(*arguments: object) -> None:
    """Name the next command, ready to be pasted into a shell."""
    console.hint(shlex.join(["ffnskip", *map(str, arguments)]))


def named_options(context: typer.Context) -> set[str]:
    """The options that the command line names; the others have their defaults."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
