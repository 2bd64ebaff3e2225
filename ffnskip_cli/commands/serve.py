"""`ffnskip serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from ffnskip_cli.commands.options import PROFILE, ModelName, Move, Offline, OtherWeights, check_profile


@dataclass(frozen=True, kw_only=True)
class Options:
    """Serve a model with a skip profile on.

    It is the OpenAI-compatible server of transformers. For example: ffnskip serve demo --profile P -- --port 8001. What
    was skipped goes to stderr at the end.
    """

    model: ModelName
    more: Annotated[
        list[str],
        typer.Argument(
            metavar="[-- OPTIONS]", help="Of `transformers serve`, such as --port, --host, --continuous-batching."
        ),
    ] = ()  # type: ignore[assignment]
    profile: Annotated[str, PROFILE]
    move: Move
    other_weights: OtherWeights = False
    offline: Offline = False

    def __post_init__(self) -> None:
        check_profile(self.profile, self.move, offline=self.offline)
