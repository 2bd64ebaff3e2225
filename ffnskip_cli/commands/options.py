"""Arguments and options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ffnskip_cli import console

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnskip.profile import Profile
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
MAX_SEED = 2**32 - 1  # more would not fit into every random generator
Seed = Annotated[
    int, typer.Option(metavar="N", min=0, max=MAX_SEED, help="Seed of everything that is drawn at random.")
]

Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="auto (as stored), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto (cuda if there is one), cpu, cuda:1, …")]
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
    name: str, *, dtype: str, device: str, revision: str | None, trust_remote_code: bool, offline: bool
) -> LoadedModel:
    """Load the model that the options name, saying so."""
    with console.busy(f"Loading {name}"):
        from ffnskip_cli.sources.models import load_model

        return load_model(
            name,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            offline=offline,
        )


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


def hint_command(*arguments: object) -> None:
    """Name the next command, ready to be pasted into a shell."""
    console.hint(shlex.join(["ffnskip", *map(str, arguments)]))
