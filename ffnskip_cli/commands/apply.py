"""`ffnskip apply`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ffnskip_cli.commands.options import ModelName, ModelOptions, Move, OtherWeights, PrintFormat


@dataclass(frozen=True, kw_only=True)
class Options:
    """Prove that a profile works on its model.

    The self-check compares the wrapped model with the untouched one, bit by bit, with skipping disabled. Then a
    paragraph of English is scored to show how often each layer's feed-forward block (FFN) would be skipped.
    """

    model: ModelName
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="The skip profile.")]
    move: Move
    other_weights: OtherWeights = False
    format: PrintFormat = "table"
    model_options: ModelOptions
