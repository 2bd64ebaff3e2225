"""`ffnskip eval`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ffnskip.errors import FfnskipError
from ffnskip_cli.commands.options import (
    PROFILE,
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
    """Run tasks of lm-eval, dense and with a profile.

    The figures stand side by side. What a task scores runs in one pass in which every position past the warm-up may
    skip; what it has the model generate skips as in decoding, behind a dense prompt. Needs lm-eval: pip install
    'ffnskip[eval]'. Its other options are those of lm_eval itself, whose model ffnskip takes a profile: see
    docs/evaluating.md.
    """

    model: ModelName
    profile: Annotated[str, PROFILE]
    tasks: Annotated[str, typer.Option(metavar="TASK[,TASK…]", help="Tasks and groups of lm-eval; * stands for any.")]
    move: Move
    other_weights: OtherWeights = False
    include_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", exists=True, file_okay=False, help="A folder of tasks of your own.")
    ] = None
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the first N examples of each task.")] = (
        None
    )
    num_fewshot: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Examples in the prompt; default: the task's own number.")
    ] = None
    batch_size: Annotated[
        str, typer.Option(metavar="N", help="Requests in a batch; auto: as many as memory allows.")
    ] = "1"
    format: PrintFormat = "table"
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the result as JSON, too.")
    ] = None
    model_options: ModelOptions

    def __post_init__(self) -> None:
        if re.fullmatch(r"auto(:[1-9]\d*)?|[1-9]\d*", self.batch_size) is None:
            raise FfnskipError(f"--batch-size must be a number, or auto, and not {self.batch_size!r}.")
        if not self.task_names:
            raise FfnskipError("--tasks names no task.")
        check_profile(self.profile, self.move, offline=self.model_options.offline)
        if self.output is not None:
            refuse_unwritable(self.output, "--output")

    @property
    def task_names(self) -> list[str]:
        """The names in --tasks."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]
