"""`ffnskip pack`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from ffnskip.errors import FfnskipError
from ffnskip_cli.commands.options import ModelName, ModelOptions, refuse_unwritable


@dataclass(frozen=True, kw_only=True)
class Options:
    """Save a model with packed weights, to load in seconds.

    The folder stands for the model wherever one is named, and takes the profiles that were made on it. Loading it needs
    no more memory than the packed weights do.
    """

    model: ModelName
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to make.")]
    weights: Annotated[
        Literal["int8", "int4"],
        typer.Option(help="Format of the weight matrices: int8, at little loss; int4, the least memory."),
    ] = "int4"
    model_options: ModelOptions

    def __post_init__(self) -> None:
        if os.path.lexists(self.output):
            raise FfnskipError(f"{self.output} exists already: name another --output, or remove it.")
        refuse_unwritable(self.output, "--output")
