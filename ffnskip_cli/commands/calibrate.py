"""`ffnskip calibrate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ffnskip_cli import console
from ffnskip_cli.commands import calibrate_options as own
from ffnskip_cli.commands import options
from ffnskip_cli.commands.calibrate_output import Format, output_paths
from ffnskip_cli.commands.calibrate_run import Files, Run

if TYPE_CHECKING:
    from ffnskip_cli.calibration.recording.file import Statistics
    from ffnskip_cli.calibration.settings import Goal


def command(
    model: options.ModelName,
    target: own.Target = None,
    max_kl: own.MaxKL = None,
    max_perplexity_increase: own.MaxPerplexityIncrease = None,
    dataset: own.Datasets = None,
    eval_dataset: own.EvalDatasets = None,
    output: own.Output = None,
    plot: own.Plot = None,
    rule: own.Rule = "predicted-damage",
    compensate: own.Compensate = "low-rank",
    rank: own.Rank = None,
    neurons: own.Neurons = None,
    fit_tokens: own.FitTokens = 98304,
    on: own.On = None,
    tokens: own.Tokens = None,
    eval_tokens: own.EvalTokens = 8192,
    sequence_length: own.SequenceLength = None,
    warm_up: own.WarmUp = "auto",
    window: own.Window = "auto",
    refresh_every: own.RefreshEvery = "auto",
    cold_s: own.ColdStart = None,
    cold_e: own.ColdEnd = None,
    candidates: own.Candidates = None,
    stats_out: own.StatsOut = None,
    stats_in: own.StatsIn = None,
    resume: own.Resume = False,
    shard: own.Shard = None,
    dry_run: own.DryRun = False,
    seed: own.Seed = None,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = "table",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    offline: options.Offline = False,
) -> None:
    """Measure a model on text and write a skip profile.

    Fits what predicts the damage of skipping each layer's feed-forward block (FFN) and what is added in its place (or,
    with --rule cosine, searches region and window), chooses the warm-up, solves the threshold for the target, verifies
    it in the running model, and measures what it costs on held-out text.
    """
    part = None if shard is None else own.parse_shard(shard)
    goals = _goals(target, max_kl, max_perplexity_increase, shard)
    files = Files(output_paths(output, model, goals), plot, stats_out, stats_in or [], resume, dry_run)
    choices: dict[str, Any] = {
        "warm_up": own.parse_count("--warm-up", warm_up, least=0, none=False),
        "window": own.parse_count("--window", window, least=1, none=True),
        "refresh_every": own.parse_count("--refresh-every", refresh_every, least=2, none=True),
        "cold_s": cold_s,
        "cold_e": cold_e,
        "candidates": own.candidates_of(rule, candidates),
        "rule": rule,
        "compensate": compensate,
        "rank": rank,
        "neurons": neurons,
        "fit_tokens": fit_tokens,
    }
    given = {"on": on, "tokens": tokens, "sequence_length": sequence_length, "seed": seed}
    with console.busy("Starting"):
        from ffnskip_cli.calibration.recording.file import load_statistics
        from ffnskip_cli.calibration.recording.ranks import join_ranks
        from ffnskip_cli.calibration.settings import Settings
        from ffnskip_cli.text.named import check_names

    files.check(part)
    statistics = load_statistics(files.stats_in) if files.stats_in else None
    settings = Settings(goals, eval_tokens=eval_tokens, **_resolved(given, statistics), **choices)
    default = [] if statistics else ["demo" if model == "demo" else "wikitext"]
    for names in ((datasets := dataset or default), eval_dataset or []):
        check_names(names, offline)
    with join_ranks() as ranks:
        if ranks.rank > 0:
            console.mute()
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
        run = Run(model, loaded, settings, files, datasets, eval_dataset or [], offline)
        run.start(statistics, files.share(part), ranks, format)


def _goals(
    target: str | None, max_kl: str | None, max_perplexity_increase: str | None, shard: str | None
) -> tuple[Goal, ...]:
    from ffnskip.errors import FfnskipError

    if shard is None:
        return own.parse_goals(target, max_kl, max_perplexity_increase)
    if (target, max_kl, max_perplexity_increase) != (None, None, None):
        raise FfnskipError("--shard only records: give the target when you solve, with --stats-in of all parts.")
    return ()


def _resolved(given: dict[str, Any], statistics: Statistics | None) -> dict[str, Any]:
    """Settings of the recording: as given, or as those that were recorded, which must not be others."""
    from ffnskip.errors import FfnskipError

    if statistics is None:
        return {name: value for name, value in given.items() if value is not None}
    text = statistics.identity.text
    recorded = {
        "on": text.on,
        "tokens": text.tokens_requested,
        "sequence_length": text.sequence_length,
        "seed": text.seed,
    }
    for name, value in given.items():
        if value is not None and value != recorded[name]:
            option = name.replace("_", "-")
            raise FfnskipError(f"The recording was made with --{option} {recorded[name]}: leave --{option} out.")
    return recorded
