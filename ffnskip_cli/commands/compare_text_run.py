"""What `ffnskip compare-text` does."""

from __future__ import annotations

from ffnskip_cli import console
from ffnskip_cli.calibration.assemble import evaluation_text
from ffnskip_cli.calibration.compare import budget, build_texts, check_texts, compare
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.recording.collect import source_of
from ffnskip_cli.calibration.settings import DEFAULT_WARM_UP, Goal
from ffnskip_cli.commands import common, loading
from ffnskip_cli.commands.compare_text import Options, PaperSettings
from ffnskip_cli.commands.options import refuse_unwritable
from ffnskip_cli.report.compare_text import print_comparison
from ffnskip_cli.report.heat_map import heat_map_kind, plot_comparison


def run(options: Options) -> None:
    """Calibrate on each text, measure on all, and print the matrices."""
    plot, names, offline = options.plot, options.dataset or [], options.model_options.offline
    if plot is not None:
        heat_map_kind(plot)
        refuse_unwritable(plot, "--plot")
    choices = dict(options.settings.keywords)
    if "warm_up" not in options.named:
        choices["warm_up"] = min(DEFAULT_WARM_UP, choices["sequence_length"] // 4)
    settings = PaperSettings((Goal("target_ratio", options.target),), **choices)
    check_texts(names, offline)
    loaded = loading.load(options.model, options.model_options, settings.rule)
    common.refuse_longer(loaded.model, settings.sequence_length, "lower --sequence-length")
    with console.busy("Preparing text"):
        texts = build_texts(loaded, names, settings, offline)
    for text in texts:
        common.warn_of_shortfall("calibration", evaluation_text(text.calibration))
        common.warn_of_shortfall("evaluation", evaluation_text(text.held_out))
    common.announce(budget(texts, settings))
    comparison = compare(Lab(loaded.model, console.track), source_of(loaded), texts, settings)
    facts = {
        "model": loaded.id,
        "device": loaded.placement,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "seed": settings.seed,
    }
    print_comparison(comparison, facts, options.format)
    if plot is not None:
        plot_comparison(comparison, loaded.id, plot)
        console.talk.print(f"Wrote {plot}.", markup=False)
