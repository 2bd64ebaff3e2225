"""`ffnskip inspect`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from ffnskip_cli.commands.options import ProfileName


@dataclass(frozen=True)
class Options:
    """Show what a skip profile holds.

    First in sentences: what it skips, saves and costs, and why. Then in tables; if it skips whole feed-forward blocks,
    with how much each of them changes its input.
    """

    profile: ProfileName
    format: Annotated[Literal["table", "json", "md"], typer.Option(help="How to print it.")] = "table"
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the profile to a .png, .svg, .pdf or .html file.")
    ] = None
    panels: Annotated[
        str | None,
        typer.Option(
            metavar="PANEL[,PANEL…]",
            help="What to draw: similarity, ratio, kl, first-skip; default: all that tells of the rule.",
        ),
    ] = None
