"""`ffnskip calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ffnskip.errors import FfnskipError
from ffnskip_cli.calibration.goals import Goal, GoalOptions
from ffnskip_cli.calibration.settings import Settings
from ffnskip_cli.commands.options import ModelName, ModelOptions, PrintFormat
from ffnskip_cli.commands.paths import output_paths


def parse_shard(text: str) -> tuple[int, int]:
    """`2/8` is the second of eight: index 1, from 0, and count 8."""
    part, _, count = text.partition("/")
    if not (part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise FfnskipError(f"--shard {text} is not I/N with I from 1 to N, such as 2/8.")
    return int(part) - 1, int(count)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a model on text and write a skip profile.

    Fits what predicts the damage of skipping each layer's feed-forward block (FFN) and what is added in its place (or,
    with --rule cosine, searches region and window), chooses the warm-up, solves the threshold for the target, verifies
    it in the running model, and measures what it costs on held-out text.
    """

    model: ModelName
    goals: GoalOptions
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Text to calibrate on: wikitext, c4, gsm8k, any Hub dataset (id[:config[:split]]), a local .txt, "
            ".jsonl or .parquet file, demo (also demo:wiki, demo:c4), or self (sampled from the model). Given several "
            "times they are mixed; TEXT=3 weighs three times as much. Default: wikitext; demo for the demo model.",
        ),
    ] = None
    eval_dataset: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Text to measure quality on; default: a held-out part of --dataset."),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="The .yaml file to write, or a folder for RATIO.yaml files. Default: profiles/MODEL/.",
        ),
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the profile to a .png, .svg, .pdf or .html file; the .html page explains it, too.",
        ),
    ] = None
    settings: partial[Settings]
    stats_out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep the recording in this .safetensors file, to solve for other targets or to --resume.",
        ),
    ] = None
    stats_in: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Take the recording from this file instead of recording anew; repeat it for all parts of one.",
        ),
    ] = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run that wrote --stats-out was stopped.")
    ] = False
    shard: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="I/N",
            help="Only record part I of N of the text to --stats-out; solve with --stats-in of all parts.",
            show_default=False,
            parser=parse_shard,
        ),
    ] = None
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only print what would run at most: forward passes, tokens, memory and time."),
    ] = False
    format: PrintFormat = "table"
    model_options: ModelOptions
    named: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.paths()  # refuses what cannot be written before anything slow begins

    def paths(self) -> dict[Goal, Path]:
        """Where the profile of each goal goes."""
        return output_paths(self.output, self.model, self.parse_goals())

    def parse_goals(self) -> tuple[Goal, ...]:
        """What to compile profiles for; a shard only records."""
        if self.shard is None:
            return self.goals.parse()
        if self.goals != GoalOptions():
            raise FfnskipError("--shard only records: give the target when you solve, with --stats-in of all parts.")
        return ()
