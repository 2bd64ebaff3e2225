"""`ffnskip card`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ffnskip_cli.commands.options import ProfileName


@dataclass(frozen=True)
class Options:
    """Write a section for a model card about a skip profile.

    It says what the profile does, its figures and where it comes from. It is Markdown, to be pasted below the card's
    own front matter. What the profile does not say is left out.
    """

    profile: ProfileName
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write it; default: stdout.")
    ] = None
