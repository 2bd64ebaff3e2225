"""What `ffnskip calibrate` prints: the profiles that it made, or what making them would take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ffnskip.compensation.kinds import compensation_name
from ffnskip_cli.report.tables import Column, print_json, print_sentence, render, turned
from ffnskip_cli.report.words import explain, threshold_title

if TYPE_CHECKING:
    from ffnskip_cli.calibration.assemble import Calibrated
    from ffnskip_cli.calibration.lab import Step

Format = Literal["table", "json", "md", "csv"]

_GOALS = ("target_ratio", "target_flops", "max_kl", "max_perplexity_increase")
_STEPS = [
    Column("step", "step"),
    Column("passes", "forward passes, at most", "d"),
    Column("tokens", "tokens", "d"),
    Column("decode_steps", "decode steps", "d"),
    Column("minutes", "minutes, at most", ".1f"),
]


def print_forecast(
    steps: Sequence[Step],
    seconds: Sequence[float],
    memory: dict[str, int],
    sequence_length: int,
    format: Format,
) -> None:
    """Print the steps with their cost, their sum, and what memory they need (bytes by name)."""
    rows: list[dict[str, object]] = [
        {
            "step": step.name,
            "passes": step.passes,
            "tokens": step.passes * sequence_length,
            "decode_steps": step.decode_steps,
            "minutes": time / 60,
        }
        for step, time in zip(steps, seconds, strict=True)
    ]
    if format == "json":
        print_json({"schema": "ffnskip-forecast/v1", "steps": rows, "memory_bytes": memory})
        return
    passes, decoding = sum(step.passes for step in steps), sum(step.decode_steps for step in steps)
    total = {"step": "all", "passes": passes, "tokens": passes * sequence_length, "decode_steps": decoding}
    render([*rows, total | {"minutes": sum(seconds) / 60}], _STEPS, format)
    if format in ("table", "md"):
        needs = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in memory.items())
        print(f"\nMemory, besides Python and PyTorch themselves: {needs}.")


def print_profiles(finished: Sequence[Calibrated], paths: Sequence[Path], format: Format) -> None:
    """Print what the profiles hold, a row each, and explain one that is alone to people."""
    rows = [_row(calibrated, path) for calibrated, path in zip(finished, paths, strict=True)]
    if format == "json":
        profiles = [calibrated.profile.model_dump(mode="json", by_alias=True) for calibrated in finished]
        found = [row | {"profile": profile} for row, profile in zip(rows, profiles, strict=True)]
        print_json({"schema": "ffnskip-calibrate/v1", "profiles": found})
        return
    columns = _columns(finished, format)
    if format == "table":
        render(*turned(rows, columns))
    else:
        render(rows, columns, format)
    if format != "csv" and len(finished) == 1:
        for sentence in explain(finished[0].profile):
            print_sentence(sentence, format)
        print()


def _row(calibrated: Calibrated, path: Path) -> dict[str, object]:
    profile = calibrated.profile
    assert profile.measured is not None
    return {
        "path": str(path),
        "goal": profile.measured.goal,
        **profile.measured.model_dump(include={*_GOALS}),
        "calibration_ratio": calibrated.calibration_ratio,
        "rule": profile.skip.rule,
        "compensation": compensation_name(profile.compensation),
        "region": f"[{profile.skip.cold_s}, {profile.skip.cold_e})",
        **profile.skip.model_dump(include={"window", "refresh_every", "warm_up", "threshold"}),
        **profile.measured.model_dump(exclude={"standard_error", "first_skipped", *_GOALS}),
    }


def _columns(finished: Sequence[Calibrated], format: Format) -> list[Column]:
    """All columns for programs; for people only those that mean something under the rule, which all profiles share."""
    skips = [calibrated.profile.skip for calibrated in finished]
    rule = skips[0].by
    meaningless = {"compensation", "never_skip_fraction"} if rule.leaves_out_parts else {"least_skipped"}
    left_out = (
        set() if rule.has_window else {"window", *(() if any(s.refresh_every for s in skips) else ["refresh_every"])}
    )
    left_out = set() if format == "csv" else left_out | meaningless
    columns = [
        Column("path", "profile"),
        Column("goal", "asked for"),
        Column("rule", "rule"),
        Column("compensation", "compensation"),
        Column("region", "skip region"),
        Column("window", "window"),
        Column("refresh_every", "refresh every"),
        Column("warm_up", "warm-up"),
        Column("threshold", threshold_title(skips[0]), ".3e" if rule.leaves_out_parts else ".6f"),
        Column("calibration_ratio", "ratio (calibration)", ".3f"),
        Column("skip_ratio", "ratio (held out)", ".3f"),
        Column("flops_saved", "FLOPs saved", ".1%"),
        Column("flops_saved_past_warm_up", "past warm-up", ".1%"),
        Column("never_skip_fraction", "never skip", ".1%"),
        Column("least_skipped", "least skipped", ".1%"),
        Column("perplexity_dense", "perplexity dense", ".2f"),
        Column("perplexity", "perplexity", ".2f"),
        Column("kl", "KL", ".3f"),
        Column("top1_agreement", "top-1 agreement", ".3f"),
    ]
    return [column for column in columns if column.key not in left_out]
