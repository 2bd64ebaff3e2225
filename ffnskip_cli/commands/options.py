"""Arguments and options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ffnskip_cli import console

if TYPE_CHECKING:
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
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn at random.")]

Dtype = Annotated[
    str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.", rich_help_panel="Model options")
]
Device = Annotated[
    str, typer.Option(help="auto (cuda if there is one), cpu, cuda:1, …", rich_help_panel="Model options")
]
Revision = Annotated[
    str | None, typer.Option(help="Commit, branch or tag on the Hub.", rich_help_panel="Model options")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code/--no-trust-remote-code",
        help="Run Python code that comes with the model.",
        rich_help_panel="Model options",
    ),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Use only what is cached already.", rich_help_panel="Model options")
]


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


def warn_if_over_budget(profile: Profile) -> None:
    """Repeat the verdict of a profile that costs more quality than it should."""
    if profile.measured is not None and not profile.measured.within_budget:
        console.warn(f"This profile is {profile.measured.verdict}.")
