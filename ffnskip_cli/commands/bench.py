"""`ffnskip bench`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from ffnskip_cli.calibration.settings import EvalTokens, seed_option
from ffnskip_cli.commands.options import (
    PROFILE,
    ModelName,
    Move,
    OtherWeights,
    PackedModelOptions,
    PrintFormat,
    check_profile,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure what a profile saves and what it costs.

    Quality is perplexity, KL and top-1 agreement with the dense model on held-out text. The baselines skip as many
    FFNs on that text by simpler means: at random, the same ones for every token (non-adaptive: evenly spread; static:
    where the FFN changes its input least; shortgpt: where the layer does), or more of them the later the token
    (skipdecode). Beside a profile of the rule price they save as many FLOPs: inputs left out by magnitude (teal,
    teal-greedy) or by magnitude and weights (wina), neurons by their gate (cats), whole FFNs at random. Speed is tokens
    per second at batch 1, along held-out text: the dense model, the profile and Hugging Face generate take turns in
    one process. With --timed-on generated each is timed on its own continuations, which repeat themselves, and there a
    profile skips far more than on text. The worst case is the share of generated tokens that skip nothing at all. With
    --weights all rows but Hugging Face's run on packed weights, and quality is compared with the model as it was
    loaded.
    """

    model: ModelName
    profile: Annotated[str, PROFILE]
    move: Move
    other_weights: OtherWeights = False
    measure: Annotated[
        str, typer.Option(metavar="PART[,PART…]", help="What to measure: quality, baselines, speed, worst-case.")
    ] = "quality,baselines,speed,worst-case"
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
    prompts: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts of the worst-case part.")] = 16
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", metavar="N", min=1, help="Timed runs per row.")] = 5
    seed: Annotated[int | None, seed_option("Order of the text; default: the calibration's.")] = None
    format: PrintFormat = "table"
    breakdown: Annotated[bool, typer.Option("--breakdown", help="Show where the time of a token goes.")] = False
    model_options: PackedModelOptions

    def __post_init__(self) -> None:
        check_profile(self.profile, self.move, offline=self.model_options.offline)
