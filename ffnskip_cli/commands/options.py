"""Arguments and options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from ffnskip.errors import FfnskipError

Format = Literal["table", "json", "md", "csv"]
Weights = Literal["auto", "int8", "int4"]

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A Hub id (org/name, org/name@revision), a local folder, a .gguf file, or `demo`."
    ),
]
A_PROFILE = "The skip profile: a file, hf://org/repo/file.yaml[@revision], or org/repo[@revision] if it holds one alone"
A_PROFILE_OR_AUTO = f"{A_PROFILE}; auto: the best one that comes with ffnskip for this very model."
ProfileName = Annotated[str, typer.Argument(metavar="PROFILE", help=f"{A_PROFILE}.")]
PROFILE = typer.Option("--profile", "-p", metavar="PROFILE", help=A_PROFILE_OR_AUTO)
PrintFormat = Annotated[Format, typer.Option(help="How to print the result.")]
Revision = Annotated[str | None, typer.Option(metavar="REVISION", help="Commit, branch or tag on the Hub.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code/--no-trust-remote-code", help="Run Python code that comes with the model.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Use only what is cached already.")]
OtherWeights = Annotated[
    bool,
    typer.Option(
        "--other-weights",
        help="Take a profile that was made on other weights of this architecture, and say what it costs on these.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Move:
    """Another threshold than the profile's."""

    threshold: Annotated[
        float | None, typer.Option(metavar="X", help="Use this threshold instead of the profile's.")
    ] = None
    target: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            help="Leave out this share of the FFNs, by the profile's curve on held-out text: moves the threshold.",
        ),
    ] = None


def check_profile(name: str, move: Move, *, offline: bool = False) -> None:
    """Refuse a profile that cannot be read, or not be moved there, before anything slow is imported."""
    from ffnskip.profiles.locate import is_auto, locate
    from ffnskip.profiles.profile import load_profile

    if not is_auto(name):
        profile = load_profile(locate(name, offline=offline), with_weights=False)
        profile.moved(threshold=move.threshold, target=move.target)


@dataclass(frozen=True, kw_only=True)
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
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Threads on a CPU; by default as many as PyTorch takes, one per core."),
    ] = None
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    offline: Offline = False


@dataclass(frozen=True, kw_only=True)
class PackedModelOptions(ModelOptions):
    """How a model is loaded that may then be packed."""

    weights: Annotated[
        Weights,
        typer.Option(
            help="Format of the weight matrices: auto (as loaded); int8, fast at little loss; int4, the least memory."
        ),
    ] = "auto"


def refuse_unwritable(path: Path, option: str) -> None:
    """Raise FfnskipError for a file that cannot be written."""
    try:
        if path.is_dir():
            raise FfnskipError(f"{path} is a folder: name another {option}.")
        above = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryDirectory(prefix=".ffnskip.", dir=above):  # permissions do not tell of /proc
            writable = True
    except OSError:  # or a name that is too long, or a file where there should be a folder
        writable = False
    if not writable:
        raise FfnskipError(f"{path} cannot be written: name another {option}.")
