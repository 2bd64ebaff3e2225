"""`ffnskip apply`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ffnskip_cli import console
from ffnskip_cli.commands.options import ModelName, ModelOptions, Move, PrintFormat
from ffnskip_cli.commands.signature import from_options


@dataclass(frozen=True, kw_only=True)
class ApplyOptions:
    """The options of `ffnskip apply`."""

    model: ModelName
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="The skip profile.")]
    move: Move
    format: PrintFormat = "table"
    model_options: ModelOptions


@from_options
def command(options: ApplyOptions) -> None:
    """Prove that a profile works on its model.

    The self-check compares the wrapped model with the untouched one, bit by bit, with skipping disabled. Then a
    paragraph of English is scored to show how often each layer's feed-forward block (FFN) would be skipped.
    """
    with console.busy("Starting"):
        from ffnskip_cli.commands.apply_run import run

    run(options)
