"""`ffnskip eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ffnskip_cli.commands.options import (
    ModelName,
    ModelOptions,
    Move,
    OtherWeights,
    PrintFormat,
    check_profile,
    refuse_unwritable,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run tasks of lm-eval with a skip profile on and without, and print both side by side.

    What the model writes is decoded. What it judges (log-likelihoods) goes through it in one pass, in which every token
    behind the warm-up may skip.
    """

    model: ModelName
    profile: Annotated[Path, typer.Option("--profile", "-p", metavar="FILE", help="The skip profile.")]
    tasks: Annotated[str, typer.Option(metavar="A,B", help="Names of lm-eval's tasks.")]
    move: Move
    other_weights: OtherWeights = False
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Questions of each task at most.")] = None
    num_fewshot: Annotated[int | None, typer.Option(metavar="N", min=0, help="Examples shown before each.")] = None
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Questions at once.")] = 1
    include_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where more tasks are, as lm-eval describes them in YAML.")
    ] = None
    chat: Annotated[bool, typer.Option("--chat", help="Put questions into the model's chat template.")] = False
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where lm-eval's results go, with all answers, as JSON."),
    ] = None
    format: PrintFormat = "table"
    model_options: ModelOptions

    def __post_init__(self) -> None:
        check_profile(self.profile, self.move)
        if self.output is not None:
            refuse_unwritable(self.output, "--output")
