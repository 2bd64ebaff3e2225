"""`ffnskip compare-text`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ffnskip_cli import console
from ffnskip_cli.commands import calibrate_options as own
from ffnskip_cli.commands import options
from ffnskip_cli.commands.calibrate_output import Format, announce, refuse_unwritable, warn_of_shortfall

if TYPE_CHECKING:
    from ffnskip_cli.calibration.settings import Settings
    from ffnskip_cli.sources.models import LoadedModel


def command(
    model: options.ModelName,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset",
            metavar="TEXT",
            help="A text to compare, as `calibrate` knows them; give at least two, each with a --dataset of its own.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[float, typer.Option(metavar="RATIO", help="Share of all FFNs to skip on each text.")] = 0.10,
    tokens: own.Tokens = None,
    eval_tokens: own.EvalTokens = 8192,
    sequence_length: own.SequenceLength = None,
    warm_up: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Generated tokens that run dense before skipping starts. Default: 25, or a quarter of a shorter "
            "sequence.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        str,
        typer.Option(
            metavar="N|none|auto", help="FFNs skipped after a trigger at most; none: all up to the end of the region."
        ),
    ] = "none",
    refresh_every: own.RefreshEvery = "none",
    cold_s: own.ColdStart = None,
    cold_e: own.ColdEnd = None,
    candidates: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Regions, windows and refreshes to try at most, for each text; 0: the region that its curve proposes.",
        ),
    ] = 0,
    seed: own.Seed = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw both matrices to a .png, .svg or .pdf file.", show_default=False),
    ] = None,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = "table",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    offline: options.Offline = False,
) -> None:
    """Say whether the calibration text matters.

    Calibrates a profile on each text, all for the same ratio, and measures every profile on the held-out part of every
    text: a matrix of ratios and one of KL. All by the paper's rule, in the region that each text's curve proposes,
    unless the options say otherwise. No profile is written.
    """
    names = dataset or []
    choices: dict[str, Any] = {
        "eval_tokens": eval_tokens,
        "window": own.parse_count("--window", window, least=1, none=True),
        "refresh_every": own.parse_count("--refresh-every", refresh_every, least=2, none=True),
        "cold_s": cold_s,
        "cold_e": cold_e,
        "candidates": candidates,
    }
    given = {"tokens": tokens, "sequence_length": sequence_length, "seed": seed}
    choices |= {name: value for name, value in given.items() if value is not None}
    if warm_up is not None:
        choices["warm_up"] = own.parse_count("--warm-up", warm_up, least=0, none=False)
    if plot is not None:
        _check_plot(plot)
    with console.busy("Starting"):
        from ffnskip_cli.calibration.compare import check_texts
    settings = _settings(target, choices)
    check_texts(names, offline)
    loaded = options.load(
        model,
        dtype=dtype,
        device=device,
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
        offline=offline,
    )
    options.refuse_longer(loaded.model, settings.sequence_length, "lower --sequence-length")
    _run(loaded, names, settings, offline, plot, format)


def _check_plot(plot: Path) -> None:
    from ffnskip_cli.report.heat_map import heat_map_kind

    heat_map_kind(plot)
    refuse_unwritable(plot, "--plot")


def _settings(target: float, choices: dict[str, Any]) -> Settings:
    """With the paper's warm-up where none was asked for: searching one for each text would blur the comparison."""
    from ffnskip_cli.calibration.settings import DEFAULT_WARM_UP, Goal, Settings

    settings = Settings((Goal("target_ratio", target),), **choices)
    if "warm_up" in choices:
        return settings
    return replace(settings, warm_up=min(DEFAULT_WARM_UP, settings.sequence_length // 4))


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
