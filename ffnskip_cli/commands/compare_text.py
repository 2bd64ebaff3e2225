"""`ffnskip compare-text`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ffnskip_cli import console
from ffnskip_cli.calibration.goals import Goal
from ffnskip_cli.calibration.settings import DEFAULT_WARM_UP, Free, Kind, On, Rule, Settings, count_option
from ffnskip_cli.commands import options
from ffnskip_cli.commands.calibrate_files import refuse_unwritable
from ffnskip_cli.commands.calibrate_output import announce, warn_of_shortfall
from ffnskip_cli.commands.options import Format, ModelName, ModelOptions, PrintFormat
from ffnskip_cli.commands.signature import from_options

if TYPE_CHECKING:
    from ffnskip_cli.sources.models import LoadedModel


@dataclass(frozen=True)
class PaperSettings(Settings):
    """Settings with the paper's rule as the default, and options for that rule alone."""

    rule: Rule = "cosine"
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


@from_options
def command(
    context: typer.Context,
    *,
    model: ModelName,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="A text to compare, as `calibrate` knows them; give at least two, each with a --dataset of its own.",
        ),
    ] = None,
    target: Annotated[float, typer.Option(metavar="RATIO", help="Share of all FFNs to skip on each text.")] = 0.10,
    settings: partial[PaperSettings],
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw both matrices to a .png, .svg or .pdf file.")
    ] = None,
    format: PrintFormat = "table",
    model_options: ModelOptions,
) -> None:
    """Say whether the calibration text matters.

    Calibrates a profile on each text, all for the same ratio, and measures every profile on the held-out part of every
    text: a matrix of ratios and one of KL. All by the paper's rule, in the region that each text's curve proposes,
    unless the options say otherwise. No profile is written.
    """
    names = dataset or []
    if plot is not None:
        _check_plot(plot)
    with console.busy("Starting"):
        from ffnskip_cli.calibration.compare import check_texts
    chosen = _settings(target, settings, "warm_up" in options.named_options(context))
    check_texts(names, model_options.offline)
    loaded = options.load(model, model_options)
    options.refuse_longer(loaded.model, chosen.sequence_length, "lower --sequence-length")
    _run(loaded, names, chosen, model_options.offline, plot, format)


def _check_plot(plot: Path) -> None:
    from ffnskip_cli.report.heat_map import heat_map_kind

    heat_map_kind(plot)
    refuse_unwritable(plot, "--plot")


def _settings(target: float, choices: partial[PaperSettings], has_warm_up: bool) -> Settings:
    """With the paper's warm-up where none was asked for: searching one for each text would blur the comparison."""
    goals = (Goal("target_ratio", target),)
    if has_warm_up:
        return choices(goals=goals)
    return choices(goals=goals, warm_up=min(DEFAULT_WARM_UP, choices.keywords["sequence_length"] // 4))


def _run(
    loaded: LoadedModel, names: list[str], settings: Settings, offline: bool, plot: Path | None, format: Format
) -> None:
    from ffnskip_cli.calibration.compare import budget, build_texts, compare
    from ffnskip_cli.calibration.recording.collect import source_of
    from ffnskip_cli.report.compare_text import print_comparison

    with console.busy("Preparing text"):
        texts = build_texts(loaded, names, settings, offline)
    for text in texts:
        warn_of_shortfall("calibration", text.calibration)
        warn_of_shortfall("evaluation", text.held_out)
    announce(budget(texts, settings))
    comparison = compare(loaded.model, source_of(loaded), texts, settings, console.track)
    facts = {
        "model": loaded.id,
        "device": loaded.placement,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "seed": settings.seed,
    }
    print_comparison(comparison, facts, format)
    if plot is not None:
        from ffnskip_cli.report.heat_map import plot_comparison

        plot_comparison(comparison, loaded.id, plot)
        console.talk.print(f"Wrote {plot}.", markup=False)
