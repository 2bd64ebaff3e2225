"""`ffnskip generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from ffnskip.errors import FfnskipError
from ffnskip_cli.calibration.settings import seed_option
from ffnskip_cli.commands.options import PROFILE, ModelName, Move, OtherWeights, PackedModelOptions, check_profile


@dataclass(frozen=True, kw_only=True)
class Options:
    """Generate text with a skip profile on, token by token.

    Without a profile it is the dense model's. The text goes to stdout; tokens per second, skip_ratio and
    never_skip_fraction go to stderr. On a CPU a quantized GGUF file is read as it is, unless --dtype or --weights ask
    for something else. What the first run of a model keeps in the cache folder lets the next ones start sooner.
    """

    model: ModelName
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to continue or answer; - reads it from stdin.")]
    profile: Annotated[str | None, PROFILE] = None
    move: Move
    other_weights: OtherWeights = False
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to generate at most.")] = 128
    temperature: Annotated[float, typer.Option(metavar="X", min=0.0, help="0 is greedy.")] = 0.0
    top_p: Annotated[
        float, typer.Option(metavar="X", min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")
    ] = 1.0
    seed: Annotated[int, seed_option("Seed of everything that is drawn at random.")] = 0
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, no chat template.")] = False
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the dense model's answer next to it, from the same --weights.")
    ] = False
    model_options: PackedModelOptions

    def __post_init__(self) -> None:
        if self.profile is None and self.compare:
            raise FfnskipError("--compare needs a --profile to compare with the dense model.")
        if self.profile is None and self.move.threshold is not None:
            raise FfnskipError("--threshold needs a --profile whose threshold it replaces.")
        if self.profile is None and self.move.target is not None:
            raise FfnskipError("--target needs a --profile along whose curve it moves.")
        if self.profile is None and self.other_weights:
            raise FfnskipError("--other-weights needs a --profile that was made on them.")
        if self.profile is not None:
            check_profile(self.profile, self.move, offline=self.model_options.offline)
