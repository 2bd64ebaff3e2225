"""`ffnskip exec`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from ffnskip_cli.commands.options import PROFILE, Move, OtherWeights, check_profile


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run a Python program with a skip profile on its models.

    Those are the models that it loads. For example: ffnskip exec --profile P -- python script.py --its-own options.
    What was skipped goes to stderr at the end. The program runs in this process: models that its child processes load
    are dense.
    """

    program: Annotated[
        list[str],
        typer.Argument(metavar="-- PROGRAM …", help="A script, an installed command, or python and what follows it."),
    ]
    profile: Annotated[str, PROFILE]
    move: Move
    mode: Annotated[
        Literal["decode", "score"],
        typer.Option(help="What may skip: generated tokens (decode), or every token past the warm-up (score)."),
    ] = "decode"
    other_weights: OtherWeights = False

    def __post_init__(self) -> None:
        check_profile(self.profile, self.move)
