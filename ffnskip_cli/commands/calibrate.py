"""`ffnskip calibrate`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ffnskip.errors import FfnskipError
from ffnskip_cli.calibration.settings import Goal, GoalKind, Settings
from ffnskip_cli.commands.options import ModelName, ModelOptions, PrintFormat, refuse_unwritable

# By option: the kind of goal, what one of its numbers is called, and an example of one.
_GOALS: dict[str, tuple[GoalKind, str, str]] = {
    "--target": ("target_ratio", "a ratio", "0.10"),
    "--target-flops": ("target_flops", "a share", "0.15"),
    "--max-kl": ("max_kl", "a limit", "0.05"),
    "--max-perplexity-increase": ("max_perplexity_increase", "a limit", "2%"),
}


@dataclass(frozen=True)
class GoalOptions:
    """The options of which exactly one says what to compile profiles for."""

    target: Annotated[
        str | None,
        typer.Option(
            metavar="RATIO[,RATIO…]",
            help="Share of all FFNs to skip on the calibration text, such as 0.10; several share one run.",
        ),
    ] = None
    target_flops: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE[,SHARE…]",
            help="Instead of --target: share of all FLOPs past warm-up to save, attention and output head included.",
        ),
    ] = None
    max_kl: Annotated[
        str | None,
        typer.Option(
            "--max-kl",
            metavar="X[,X…]",
            help="Instead of --target: skip as much as keeps the KL from the dense model within X nats per token.",
        ),
    ] = None
    max_perplexity_increase: Annotated[
        str | None,
        typer.Option(
            metavar="X%[,X%…]",
            help="Instead of --target: skip as much as keeps the perplexity within X% above the dense model's.",
        ),
    ] = None

    def parse(self) -> tuple[Goal, ...]:
        """One goal for each number; raises FfnskipError unless exactly one option holds such numbers."""
        texts = (self.target, self.target_flops, self.max_kl, self.max_perplexity_increase)
        chosen = [(option, text) for option, text in zip(_GOALS, texts, strict=True) if text is not None]
        if len(chosen) != 1:
            raise FfnskipError(
                f"Say what to aim for with exactly one of {', '.join(_GOALS)}; --target-flops 0.15 is a start."
            )
        ((option, text),) = chosen
        kind, noun, example = _GOALS[option]
        values = _numbers(option, text, f"{noun} such as {example}")
        if len(set(values)) < len(values):
            raise FfnskipError(f"{option} {text} names {noun} twice.")
        return tuple(Goal(kind, value) for value in values)


def _numbers(option: str, text: str, example: str) -> list[float]:
    """The numbers between the commas; per cent if the example is."""
    per_cent = "%" in example
    if not per_cent and "%" in text:
        raise FfnskipError(f"{option} {text} is not {example}: leave the % out.")
    try:
        numbers = [float(part.removesuffix("%")) for part in text.split(",")]
    except ValueError:
        raise FfnskipError(f"{option} {text} is not {example}, or several with commas between.") from None
    if not per_cent:
        return numbers
    if text.count("%") < len(numbers):
        raise FfnskipError(f"{option} {text} lacks its unit: write 2% for two per cent.")
    return [number / 100 for number in numbers]


def parse_shard(text: str) -> tuple[int, int]:
    """`2/8` is the second of eight: index 1, from 0, and count 8."""
    part, _, count = text.partition("/")
    if not (part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise FfnskipError(f"--shard {text} is not I/N with I from 1 to N, such as 2/8.")
    return int(part) - 1, int(count)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a model on text and write a skip profile.

    Measures what each input of the model's matrices contributes to its predictions (or, with --rule predicted-damage,
    fits what predicts the damage of skipping a whole FFN and what is added in its place; with --rule cosine, searches
    region and window), chooses the warm-up, solves the threshold for the target, verifies it in the running model, and
    measures what it costs on held-out text.
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
        """Where the profile of each goal goes; checked now, because the run is long."""
        goals, output = self.parse_goals(), self.output
        if output is None:
            name = os.path.basename(os.path.abspath(self.model.partition("@")[0]))
            output = Path("profiles", name.lower().removesuffix(".gguf"))
        if output.suffix in (".yaml", ".yml"):
            if len(goals) > 1:
                raise FfnskipError(f"{output} is one file, but there are {len(goals)} targets: name a folder instead.")
            paths = dict.fromkeys(goals, output)
        else:
            paths = {goal: output / goal.file_name for goal in goals}
        for path in paths.values():
            refuse_unwritable(path, "--output")
        return paths

    def parse_goals(self) -> tuple[Goal, ...]:
        """What to compile profiles for; a shard only records."""
        if self.shard is None:
            return self.goals.parse()
        if self.goals != GoalOptions():
            raise FfnskipError("--shard only records: give the target when you solve, with --stats-in of all parts.")
        return ()
