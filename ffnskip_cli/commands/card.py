"""`ffnskip card`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ffnskip_cli.commands.options import ProfileName


@dataclass(frozen=True)
class Options:
    """Write the section of a model card that describes a skip profile: what it does, its figures, its provenance.

    It is Markdown, to be pasted below the card's own front matter. What the profile does not say is left out.
    """

    profile: ProfileName
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write it; default: stdout.")
    ] = None
