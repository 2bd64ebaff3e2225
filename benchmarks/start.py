"""From the shell to the first character of an answer, by `ffnskip generate`.

    python benchmarks/start.py demo --rounds 9

prints a table as Markdown: medians of runs that take turns. A start by what an earlier run has kept of the model stands
beside one that loads the model by transformers (as any precision that is asked for makes it), and beside what Python
takes to import torch, or torch and transformers, which bound the two from below. Files are in the system's cache, as a
run of each goes before.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

FFNSKIP = str(Path(sys.executable).with_name("ffnskip"))
WORDS = "print('a')"


def main(
    model: Annotated[str, typer.Argument(help="A model that is stored in bfloat16.")] = "demo",
    profile: Annotated[str | None, typer.Option(help="A profile for it.")] = None,
    rounds: Annotated[int, typer.Option(help="Runs of each that count.")] = 9,
) -> None:
    """Measure and print."""
    generate = [FFNSKIP, "generate", model, "hi", "--max-new-tokens", "4", *(["--profile", profile] if profile else [])]
    ways = {
        "`import torch`": [sys.executable, "-c", f"import torch; {WORDS}"],
        "`import torch`, `AutoModelForCausalLM`": [
            *(sys.executable, "-c"),
            f"import torch; from transformers import AutoModelForCausalLM; {WORDS}",
        ],
        "generate, the model loaded": [*generate, "--dtype", "bfloat16"],
        "generate, as kept": generate,
    }
    for command in ways.values():
        _seconds(command)
    seconds = {name: list[float]() for name in ways}
    for _ in range(rounds):
        for name, command in ways.items():
            seconds[name].append(_seconds(command))
    base = median(seconds["generate, the model loaded"])
    print(
        "| from the shell to the first character | median, s | fastest, s | of loading the model |\n|---|---|---|---|"
    )
    for name, found in seconds.items():
        print(f"| {name} | {median(found):.2f} | {min(found):.2f} | {median(found) / base:.2f} |")


def _seconds(command: Sequence[str]) -> float:
    """Until something is on stdout; the run is then let finish."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdout is not None
        first = run.stdout.read(1)
        seconds = time.perf_counter() - start
        run.stdout.read()
    if run.returncode or not first:
        raise typer.BadParameter(f"{' '.join(command)} fails")
    return seconds


if __name__ == "__main__":
    typer.run(main)
