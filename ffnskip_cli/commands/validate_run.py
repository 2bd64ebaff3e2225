"""What `ffnskip validate` does."""

import os
from pathlib import Path

import typer

from ffnskip.errors import ProfileError
from ffnskip.profiles.profile import load_profile
from ffnskip_cli import console
from ffnskip_cli.commands.validate import Options
from ffnskip_cli.report.tables import print_json


def run(options: Options) -> None:
    """Check every profile; raises typer.Exit with code 2 after a mistake."""
    verdicts = [(path, _mistake(path)) for argument in options.profiles for path in _files(argument)]
    if options.format == "json":
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
    if os.path.isdir(argument):
        return sorted(argument.rglob("*.yaml")) or [argument]
    return [argument]


def _mistake(path: Path) -> str | None:
    if os.path.isdir(path):
        return f"{path}: the folder holds no .yaml file; name a profile."
    try:
        load_profile(path)
    except ProfileError as error:
        message = str(error)
        return message if message.startswith(f"{path}: ") else f"{path}: {message}"  # of the weights that it names
    return None
