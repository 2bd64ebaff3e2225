"""Arguments and options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ffnskip_cli import console
from ffnskip_cli.budget import MAX_KL

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnskip.decoder import Decoder
    from ffnskip.profiles.profile import Profile
    from ffnskip_cli.sources.models import LoadedModel

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A Hub id (org/name, org/name@revision), a local folder, a .gguf file, or `demo`."
    ),
]
ProfilePath = Annotated[Path, typer.Option("--profile", "-p", metavar="FILE", help="The skip profile.")]
Threshold = Annotated[
    float | None, typer.Option(metavar="X", help="Use this threshold instead of the profile's.", show_default=False)
]
Target = Annotated[
    float | None,
    typer.Option(
        metavar="RATIO",
        help="Skip this share of all FFNs, as on the profile's held-out text: moves the threshold along its curve.",
        show_default=False,
    ),
]
MAX_SEED = 2**32 - 1  # more would not fit into every random generator
Seed = Annotated[
    int, typer.Option(metavar="N", min=0, max=MAX_SEED, help="Seed of everything that is drawn at random.")
]

Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="auto (as stored), float32, bfloat16 or float16.")]
WeightFormat = Annotated[
    Literal["auto", "int8", "int4"],
    typer.Option(
        help="Format of the weight matrices: auto (as loaded); int8, fast at little loss; int4, the least memory.",
        show_default=True,
    ),
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto (cuda if there is one), cpu, cuda:1, …")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="MAP",
        help="auto spreads the model over all devices and the CPU, by accelerate; also balanced, sequential.",
        show_default=False,
    ),
]
Revision = Annotated[str | None, typer.Option(metavar="REVISION", help="Commit, branch or tag on the Hub.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code/--no-trust-remote-code",
        help="Run Python code that comes with the model.",
    ),
]
Offline = Annotated[bool, typer.Option("--offline", help="Use only what is cached already.")]


def load(
    name: str,
    *,
    dtype: str,
    device: str,
    device_map: str | None = None,
    revision: str | None,
    trust_remote_code: bool,
    offline: bool,
) -> LoadedModel:
    """Load the model that the options name, saying so."""
    with console.busy(f"Loading {name}"):
        from ffnskip_cli.sources.models import load_model

        loaded = load_model(
            name,
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
            offline=offline,
        )
    if device_map is not None:
        console.talk.print(f"The model lies on {loaded.placement}.")
    return loaded


def say_path(decoder: Decoder) -> None:
    """Say when decoding is slower than it could be, and why."""
    if decoder.why_general is not None:
        console.talk.print(f"Decoding by the general path: {decoder.why_general}", highlight=False)


def refuse_longer(model: PreTrainedModel, tokens: int, instead: str) -> None:
    """Raise FfnskipError for sequences beyond the model's positions: an index error in some models, noise in others."""
    from ffnskip.errors import FfnskipError

    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and tokens > most:
        raise FfnskipError(f"The model takes at most {most} tokens, but this needs {tokens}: {instead}.")


def warn_if_over_budget(profile: Profile, name: object = "This profile") -> None:
    """Repeat the verdict of a profile that costs more quality than it should."""
    if profile.measured is not None and not profile.measured.within_budget:
        console.warn(f"{name} is {profile.measured.verdict}.")


def say_expected_cost(profile: Profile, threshold: float | None, target: float | None) -> None:
    """Warn of a profile that costs too much, as far as it knows what it costs at the threshold or target asked for."""
    if target is not None:
        _say_cost_at(profile, target)
    elif threshold is None:
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
