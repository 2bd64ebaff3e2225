"""`ffnskip validate`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import typer


@dataclass(frozen=True)
class Options:
    """Check that skip profiles follow the schema.

    The weights that a profile names must lie beside it, unaltered. Every file is checked, a mistake is reported with
    its file, its field and the reason, and the exit code is then 2.
    """

    profiles: Annotated[
        list[str],
        typer.Argument(
            metavar="PROFILE",
            help="Skip profiles, folders of which every .yaml file is checked, or repositories of the Hub.",
        ),
    ]
    format: Annotated[Literal["table", "json"], typer.Option(help="How to print the result.")] = "table"
