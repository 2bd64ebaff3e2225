"""`ffnskip profiles`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from ffnskip_cli.commands.options import ModelName, Offline, PrintFormat, Revision, TrustRemoteCode


@dataclass(frozen=True, kw_only=True)
class Options:
    """List the skip profiles that fit a model.

    The model's weights are not loaded: the architecture is compared, and the GGUF file or the commit where the profile
    names one. Whether the weights are those that a profile was made on is checked when it is put on.
    """

    model: ModelName
    place: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="PLACE",
            help="A folder, or a repository of the Hub (org/repo[@revision]); default: those that come with ffnskip.",
        ),
    ] = None
    format: PrintFormat = "table"
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    offline: Offline = False
