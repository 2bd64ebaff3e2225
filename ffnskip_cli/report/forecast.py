"""What `ffnskip calibrate --dry-run` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from ffnskip_cli.report.tables import Column, print_json, render

if TYPE_CHECKING:
    from ffnskip_cli.calibration.lab import Step

_COLUMNS = [
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
    format: Literal["table", "json", "md", "csv"],
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
    render([*rows, total | {"minutes": sum(seconds) / 60}], _COLUMNS, format)
    if format in ("table", "md"):
        needs = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in memory.items())
        print(f"\nMemory, besides Python and PyTorch themselves: {needs}.")
