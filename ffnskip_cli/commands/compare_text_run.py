"""What `ffnskip compare-text` does."""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from pathlib import Path

from ffnskip_cli import console
from ffnskip_cli.calibration.compare import budget, build_texts, check_texts, compare
from ffnskip_cli.calibration.goals import Goal
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.recording.collect import source_of
from ffnskip_cli.calibration.settings import DEFAULT_WARM_UP
from ffnskip_cli.commands import options
from ffnskip_cli.commands.calibrate_files import refuse_unwritable
from ffnskip_cli.commands.calibrate_output import announce, warn_of_shortfall
from ffnskip_cli.commands.compare_text import PaperSettings
from ffnskip_cli.commands.options import Format, ModelOptions
from ffnskip_cli.report.compare_text import print_comparison
from ffnskip_cli.report.heat_map import heat_map_kind, plot_comparison


def run(
    model: str,
    names: list[str],
    target: float,
    choices: partial[PaperSettings],
    plot: Path | None,
    format: Format,
    model_options: ModelOptions,
    named: Set[str],
) -> None:
    """Calibrate on each text, measure on all, and print the matrices; `named` are the options on the command line."""
    if plot is not None:
        heat_map_kind(plot)
        refuse_unwritable(plot, "--plot")
    usual = {} if "warm_up" in named else {"warm_up": min(DEFAULT_WARM_UP, choices.keywords["sequence_length"] // 4)}
    settings = choices(goals=(Goal("target_ratio", target),), **usual)
    check_texts(names, model_options.offline)
    loaded = options.load(model, model_options)
    options.refuse_longer(loaded.model, settings.sequence_length, "lower --sequence-length")
    with console.busy("Preparing text"):
        texts = build_texts(loaded, names, settings, model_options.offline)
    for text in texts:
        warn_of_shortfall("calibration", text.calibration)
        warn_of_shortfall("evaluation", text.held_out)
    announce(budget(texts, settings))
    comparison = compare(Lab(loaded.model, console.track), source_of(loaded), texts, settings)
    facts = {
        "model": loaded.id,
        "device": loaded.placement,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "seed": settings.seed,
    }
    print_comparison(comparison, facts, format)
    if plot is not None:
        plot_comparison(comparison, loaded.id, plot)
        console.talk.print(f"Wrote {plot}.", markup=False)
