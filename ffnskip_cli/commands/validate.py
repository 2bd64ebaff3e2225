"""`ffnskip validate`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


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
    from ffnskip_cli.commands.validate_run import run

    run(profiles, format)
