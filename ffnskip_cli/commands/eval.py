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
class JudgeOptions:
    """Who judges answers that no rule can score."""

    judge_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="An OpenAI-compatible endpoint, such as http://localhost:8000/v1, that compares the answers to "
            "mt_bench and cnn_dailymail; its key is $OPENAI_API_KEY.",
        ),
    ] = None
    judge_model: Annotated[str | None, typer.Option(metavar="NAME", help="The judge's name there.")] = None
    judge_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="Longest wait for a reply of the judge.")
    ] = 120.0

    def __post_init__(self) -> None:
        if (self.judge_url is None) != (self.judge_model is None):
            raise FfnskipError("A judge needs both --judge-url and --judge-model.")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run tasks, dense and with a profile.

    Those of the paper are freebaseqa, cnn_dailymail, mt_bench, mmlu and gsm8k; to them come all others of lm-eval.
    The figures stand side by side with their differences, each with its standard error. What a task scores runs in
    one pass in which every position past the warm-up may skip; what it has the model generate skips as in decoding,
    behind a dense prompt.

    Every answer is kept as it comes, beside the -o file or in the cache folder: the same command goes on where a
    killed one stopped. Needs lm-eval: pip install 'ffnskip[eval]'. See docs/evaluating.md.
    """

    model: ModelName
    profile: Annotated[str, PROFILE]
    tasks: Annotated[
        str, typer.Option(metavar="TASK[,TASK…]", help="Tasks and groups by their names; * stands for any.")
    ]
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[TASK=]FILE",
            help="A local copy of a task's data, instead of that on the Hub; the only task needs no name. Repeatable.",
        ),
    ] = None
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
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put prompts as a chat; mt_bench always does.")
    ] = False
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Longest generated answer; default: the task's own.")
    ] = None
    batch_size: Annotated[
        str, typer.Option(metavar="N", help="Requests in a batch; auto: as many as memory allows.")
    ] = "1"
    judge: JudgeOptions
    format: PrintFormat = "table"
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the result, too: FILE.html, a page with the answers side by side; any other name, JSON.",
        ),
    ] = None
    model_options: ModelOptions

    def __post_init__(self) -> None:
        if re.fullmatch(r"auto(:[1-9]\d*)?|[1-9]\d*", self.batch_size) is None:
            raise FfnskipError(f"--batch-size must be a number, or auto, and not {self.batch_size!r}.")
        if not self.task_names:
            raise FfnskipError("--tasks names no task.")
        _ = self.files
        check_profile(self.profile, self.move, offline=self.model_options.offline)
        if self.output is not None:
            refuse_unwritable(self.output, "--output")

    @property
    def task_names(self) -> list[str]:
        """The names in --tasks."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]

    @property
    def files(self) -> dict[str, Path]:
        """The local data of each task that has some; raises FfnskipError for what names no task or no file."""
        files: dict[str, Path] = {}
        for given in self.data or []:
            name, equals, path = given.partition("=")
            if not equals or name not in self.task_names:  # a file, whose own name may have such a sign
                if len(self.task_names) != 1:
                    raise FfnskipError(f"--data must be TASK=FILE with one of --tasks, and not {given!r}.")
                name, path = self.task_names[0], given
            if not Path(path).is_file():
                raise FfnskipError(f"There is no file {path}: --data takes FILE, or TASK=FILE with one of --tasks.")
            if name in files:
                raise FfnskipError(f"--data names two files for {name}.")
            files[name] = Path(path).absolute()
        return files
