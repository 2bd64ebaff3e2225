"""What `ffnskip validate` does."""

import os
from collections.abc import Iterator
from pathlib import Path

import typer

from ffnskip.errors import FfnskipError
from ffnskip.files import read_regular
from ffnskip.profiles.locate import Located, locate, locate_all
from ffnskip.profiles.profile import load_profile
from ffnskip.profiles.strict_yaml import MAX_BYTES
from ffnskip_cli import console
from ffnskip_cli.commands.validate import Options
from ffnskip_cli.report.tables import print_json


def run(options: Options) -> None:
    """Check every profile; raises typer.Exit with code 2 after a mistake."""
    verdicts = [verdict for argument in options.profiles for verdict in _verdicts(argument)]
    if options.format == "json":
        files = [{"path": path, "valid": not mistake, "error": mistake} for path, mistake in verdicts]
        print_json({"schema": "ffnskip-validate/v1", "files": files})
    else:
        for path, mistake in verdicts:
            if mistake:
                console.error(mistake)
            else:
                print(f"ok  {path}")
    if any(mistake for _, mistake in verdicts):
        raise typer.Exit(2)


def _verdicts(argument: str) -> Iterator[tuple[str, str | None]]:
    """The name of each profile that an argument stands for, and what is wrong with it, if anything."""
    try:
        if os.path.isdir(argument):
            found = sorted(Path(argument).rglob("*.yaml"))
            if foreign := [str(path) for path in found if not _is_meant(path)]:
                console.talk.print(f"No profiles, and passed over: {', '.join(foreign)}", highlight=False, markup=False)
            files = [locate(path) for path in found if str(path) not in foreign]
        else:
            files = locate_all(argument)
    except FfnskipError as error:
        yield argument, str(error)
        return
    if not files:
        what = "folder holds no profile" if os.path.isdir(argument) else "repository holds no skip profile"
        yield argument, f"{argument}: the {what}; name a profile."
    for file in files:
        yield file.name, _mistake(file)


def _is_meant(path: Path) -> bool:
    """Whether a file says, in whatever encoding, that it belongs to ffnskip; so of what cannot be read."""
    try:
        data = read_regular(path, MAX_BYTES)
    except OSError:
        return True
    return data is None or b"ffnskip" in data.replace(b"\0", b"")


def _mistake(file: Located) -> str | None:
    try:
        load_profile(file)
    except FfnskipError as error:
        message = str(error)
        return message if message.startswith(f"{file.name}: ") else f"{file.name}: {message}"  # of the weights
    return None
