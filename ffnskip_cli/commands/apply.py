"""`ffnskip apply`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ffnskip.errors import FfnskipError
from ffnskip_cli.commands.options import (
    A_PROFILE_OR_AUTO,
    ModelName,
    ModelOptions,
    Move,
    OtherWeights,
    PrintFormat,
    check_profile,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Prove that a profile works on its model.

    The self-check compares the wrapped model with the untouched one, bit by bit, with skipping disabled. Then a
    paragraph of English is scored to show how often each layer's feed-forward block (FFN) would be skipped. On a CPU a
    quantized GGUF file is read as it is, unless --dtype asks for something else.
    """

    model: ModelName
    profile: Annotated[str, typer.Argument(metavar="PROFILE", help=A_PROFILE_OR_AUTO)]
    move: Move
    other_weights: OtherWeights = False
    format: PrintFormat = "table"
    model_options: ModelOptions

    def __post_init__(self) -> None:
        swapped = Path(self.model).suffix in (".yaml", ".yml") and os.path.isfile(self.model)
        if swapped and not os.path.isfile(self.profile):
            raise FfnskipError(f"{self.model} is a profile, and comes second: ffnskip apply MODEL PROFILE.")
        check_profile(self.profile, self.move, offline=self.model_options.offline)
