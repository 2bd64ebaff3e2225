"""`ffnskip diff`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import typer


@dataclass(frozen=True)
class Options:
    """Say how two skip profiles differ.

    First in three sentences: what both are for, what B skips and costs beyond A, and how surely, and whether that is
    within the quality budget. Then every field that differs.
    """

    a: Annotated[str, typer.Argument(metavar="A", help="The skip profile as it was: a file or a name on the Hub.")]
    b: Annotated[str, typer.Argument(metavar="B", help="The skip profile as it is.")]
    format: Annotated[
        Literal["table", "md", "json"], typer.Option(help="How to print it; md is made for a pull request.")
    ] = "table"
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 if the profiles differ.")] = False
