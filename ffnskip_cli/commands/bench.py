"""`ffnskip bench`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from ffnskip.errors import FfnskipError
from ffnskip_cli.calibration.settings import EvalTokens, seed_option
from ffnskip_cli.commands.options import (
    PROFILE,
    ModelName,
    Move,
    OtherWeights,
    PackedModelOptions,
    PrintFormat,
    check_profile,
    refuse_unwritable,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure what a profile saves and what it costs.

    Quality is perplexity, KL and top-1 agreement with the dense model on held-out text. Opponents save as many FLOPs,
    past the warm-up and net, by other means. Whole FFNs: at random; the same ones for every token (non-adaptive: evenly
    spread; static: where the FFN changes its input least); by FFN-SkipLLM's rule as printed (ffn-skipllm) and as in its
    authors' code (unpublished). Whole layers: shortgpt, skipdecode. Parts: inputs by magnitude (teal, teal-greedy) or
    by magnitude and weights (wina), neurons by their gate (cats).

    Speed is tokens per second at batch 1, along held-out text: the dense model, the profile and Hugging Face generate
    take turns in one process. With --timed-on generated each is timed on its own continuations, which repeat
    themselves, and there a profile skips far more than on text. The worst case is the share of generated tokens that
    skip nothing at all. Layers says what each layer's skipping adds to the KL. With --weights all rows but Hugging
    Face's run on packed weights, and quality is compared with the model as it was loaded.

    --sweep, --worst-case and --warm-up print the tables of FFN-SkipLLM's paper instead, each from this one profile.
    """

    model: ModelName
    profile: Annotated[str, PROFILE]
    move: Move
    other_weights: OtherWeights = False
    measure: Annotated[
        str | None,
        typer.Option(
            metavar="PART[,PART…]",
            help="What to measure: quality, opponents, speed, worst-case, layers. Default: all but layers; in a sweep "
            "quality and speed.",
        ),
    ] = None
    opponents: Annotated[
        str, typer.Option(metavar="NAME[,NAME…]", help="Which opponents to measure, of those above.")
    ] = "all"
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE[,SHARE…]",
            help="Table 4: move the profile to each of these shares of all FLOPs saved past the warm-up.",
        ),
    ] = None
    worst_case: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N…]",
            help="Table 6: of so many new tokens behind each prompt those that never skip, by the profile and by the "
            "paper's rule at 0.9.",
        ),
    ] = None
    warm_up: Annotated[
        str | None,
        typer.Option(metavar="N[,N…]", help="Figure 5: what the profile costs with each of these warm-ups."),
    ] = None
    eval_dataset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Text to measure on; several are mixed, TEXT=3 weighs three times as much. Default: what the profile "
            "was measured on.",
        ),
    ] = None
    eval_tokens: EvalTokens = 8192
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each prompt.")] = 128
    new_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens to decode behind each prompt.")] = 256
    timed_on: Annotated[
        Literal["text", "generated"],
        typer.Option(
            help="What is decoded against the clock: the held-out text behind each prompt, fed token by token, or what "
            "the model itself makes of the prompt, greedily."
        ),
    ] = "text"
    prompts: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts of the worst case.")] = 16
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", metavar="N", min=1, help="Timed runs per row.")] = 5
    seed: Annotated[int | None, seed_option("Order of the text; default: the calibration's.")] = None
    format: PrintFormat = "table"
    breakdown: Annotated[bool, typer.Option("--breakdown", help="Show where the time of a token goes.")] = False
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the result too, as JSON, or as a page for browsers if FILE ends in .html.",
        ),
    ] = None
    model_options: PackedModelOptions

    def __post_init__(self) -> None:
        check_profile(self.profile, self.move, offline=self.model_options.offline)
        if self.output is not None:
            refuse_unwritable(self.output, "--output")
        if self.sweep is not None and (self.move.threshold is not None or self.move.target is not None):
            raise FfnskipError("--sweep moves the profile itself: leave --threshold and --target out.")
        for option, given, numbers in (
            ("--sweep", self.sweep, self.savings),
            ("--worst-case", self.worst_case, self.lengths),
            ("--warm-up", self.warm_up, self.warm_ups),
        ):
            if given is not None and not numbers:
                raise FfnskipError(f"{option} names no number.")
        of_rows = self.measure is not None or self.opponents != "all" or self.breakdown
        if self.has_tables and not self.savings and of_rows:
            raise FfnskipError("--measure, --opponents and --breakdown are of the usual rows and of --sweep alone.")
        if self.format == "csv" and sum(map(bool, (self.savings, self.lengths, self.warm_ups))) > 1:
            raise FfnskipError("--format csv holds one table: ask for one, or for another format.")
        if not all(0 < share < 1 for share in self.savings):
            raise FfnskipError(f"--sweep takes shares of all FLOPs between 0 and 1, not {self.sweep}.")
        if not all(length > 1 for length in self.lengths):
            raise FfnskipError(f"--worst-case takes lengths of at least 2 tokens, not {self.worst_case}.")

    @property
    def savings(self) -> list[float]:
        """The shares of --sweep."""
        return sorted(set(_numbers("--sweep", self.sweep)))

    @property
    def lengths(self) -> list[int]:
        """The lengths of --worst-case."""
        return sorted(set(_whole("--worst-case", self.worst_case)))

    @property
    def warm_ups(self) -> list[int]:
        """The numbers of --warm-up."""
        return sorted(set(_whole("--warm-up", self.warm_up)))

    @property
    def has_tables(self) -> bool:
        """Whether tables of the paper are asked for."""
        return bool(self.savings or self.lengths or self.warm_ups)


def _numbers(option: str, text: str | None) -> list[float]:
    try:
        return [float(word) for word in (text or "").split(",") if word.strip()]
    except ValueError:
        raise FfnskipError(f"{option} takes numbers with commas between them, not {text}.") from None


def _whole(option: str, text: str | None) -> list[int]:
    numbers = _numbers(option, text)
    if not all(math.isfinite(number) and number >= 0 and number == int(number) for number in numbers):
        raise FfnskipError(f"{option} takes whole numbers that are not negative, not {text}.")
    return [int(number) for number in numbers]
