"""`ffnskip validate`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ffnskip_cli import console


def command(
    profiles: Annotated[
        list[Path],
        typer.Argument(metavar="PROFILE", help="Skip profiles, or folders of which every .yaml file is checked."),
    ],
    format: Annotated[Literal["table", "json"], typer.Option(help="How to print the result.")] = "table",
) -> None:
    """Check that skip profiles follow the schema.

    The weights that a profile names must lie beside it, unaltered. Every file is checked, a mistake is reported with
    its file, its field and the reason, and the exit code is then 2.
    """
    from ffnskip_cli.report.tables import print_json

    verdicts = [(path, _mistake(path)) for argument in profiles for path in _files(argument)]
    if format == "json":
        files = [{"path": str(path), "valid": not mistake, "error": mistake} for path, mistake in verdicts]
        print_json({"schema": "ffnskip-validate/v1", "files": files})
    else:
        for path, mistake in verdicts:
            if mistake:
                console.error(mistake)
            else:
                print(f"ok  {path}")
    if any(mistake for _, mistake in verdicts):
        raise typer.Exit(2)


def _files(argument: Path) -> list[Path]:
    """The profiles that an argument stands for; a folder without any stands for itself, and is a mistake."""
    if argument.is_dir():
        return sorted(argument.rglob("*.yaml")) or [argument]
    return [argument]


def _mistake(path: Path) -> str | None:
    from ffnskip.errors import ProfileError
    from ffnskip.profiles.profile import load_profile

    if path.is_dir():
        return f"{path}: the folder holds no .yaml file; name a profile."
    try:
        load_profile(path)
    except ProfileError as error:
        message = str(error)
        return message if message.startswith(f"{path}: ") else f"{path}: {message}"  # of the weights that it names
    return None
