"""`ffnskip compare-text`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ffnskip_cli.calibration.settings import DEFAULT_WARM_UP, Free, Kind, On, Settings, count_option
from ffnskip_cli.commands.options import ModelName, ModelOptions, PrintFormat


@dataclass(frozen=True)
class PaperSettings(Settings):
    """Settings with the paper's rule as the default, and options for that rule alone."""

    rule: str = "cosine"
    compensate: Kind = "none"
    rank: int | None = None
    neurons: int | None = None
    fit_tokens: int = Settings.fit_tokens
    on: On = "text"
    warm_up: Annotated[
        int | Free,
        count_option(
            "--warm-up",
            0,
            "Generated tokens that run dense before skipping starts. Default: 25, or a quarter of a shorter sequence.",
            show_default=False,
        ),
    ] = DEFAULT_WARM_UP
    window: Annotated[
        int | Free | None,
        count_option(
            "--window", 1, "FFNs skipped after a trigger at most; none: all up to the end of the region.", none=True
        ),
    ] = None
    refresh_every: Annotated[
        int | Free | None, count_option("--refresh-every", 2, "Run every N-th token dense; none: never.", none=True)
    ] = None
    candidates: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Regions, windows and refreshes to try at most, for each text; 0: the region that its curve proposes.",
        ),
    ] = 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say whether the calibration text matters.

    Calibrates a profile on each text, all for the same ratio, and measures every profile on the held-out part of every
    text: a matrix of ratios and one of KL. All by the paper's rule, in the region that each text's curve proposes,
    unless the options say otherwise. No profile is written.
    """

    model: ModelName
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="A text to compare, as `calibrate` knows them; give at least two, each with a --dataset of its own.",
        ),
    ] = None
    target: Annotated[float, typer.Option(metavar="RATIO", help="Share of all FFNs to skip on each text.")] = 0.10
    settings: partial[PaperSettings]
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw both matrices to a .png, .svg or .pdf file.")
    ] = None
    format: PrintFormat = "table"
    model_options: ModelOptions
    named: frozenset[str] = frozenset()
