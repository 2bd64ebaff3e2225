"""Kill calibrations at random times, let them resume, and look at what is on the disk: `make torture`.

A run that was killed may leave what is finished, and nothing that is half; in the end it must have written the bytes of
a run that nobody disturbed. Each run is a fork of this process, so that nothing but the calibration takes time.
"""

import math
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # a fork of several threads would hang
sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
import torch
from support.cli import run
from support.on_disk import save_plateau, save_text

from ffnskip.errors import FfnskipError
from ffnskip.profiles.profile import load_profile
from ffnskip_cli.calibration.recording.file import load_statistics
from ffnskip_cli.commands import calibrate_run as calibrate_run  # once for all forks

KILLS, PER_RUN = 100, 5
SIZES = ("--tokens", 1024, "--fit-tokens", 1024, "--eval-tokens", 512, "--sequence-length", 32, "--warm-up", 4)
RULES = {
    "predicted-damage": ("--rank", 4, "--neurons", 4),
    "cosine": ("--rule", "cosine", "--compensate", "none", "--candidates", 4),
    "price": ("--rule", "price"),
}


def start(arguments: tuple[object, ...]) -> int:
    """The process id of a calibration; its exit code is that of the command."""
    child = os.fork()
    if child == 0:
        result = run(*arguments)
        if result.exit_code:
            print(result.stderr, result.exception, file=sys.stderr, flush=True)
        os._exit(result.exit_code)
    return child


def ended(child: int, seconds: float = math.inf) -> tuple[int, float] | None:
    """Exit status and seconds at work of a process; None if it has worked for longer and is still there.

    Not by the clock, so that a busy machine changes nothing.
    """
    while True:
        found, status, used = os.wait4(child, os.WNOHANG)
        if found:
            return status, used.ru_utime + used.ru_stime
        now = psutil.Process(child).cpu_times()
        if now.user + now.system > seconds:
            return None
        time.sleep(0.005)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def corrupt(folder: Path) -> list[str]:
    """Files under their final names that cannot be read."""
    broken = []
    for path in folder.glob("*.yaml"):
        try:
            load_profile(path)
        except FfnskipError as error:
            broken.append(str(error))
    try:
        if (recording := folder / "recording.safetensors").exists():
            load_statistics([recording])
    except FfnskipError as error:
        broken.append(str(error))
    return broken


def torture(rule: str, kills: int, base: Path, draw: random.Random) -> Counter[str]:
    """Calibrate, and be killed that often in all."""
    figures: Counter[str] = Counter()
    model, text = save_plateau(base / "model"), save_text(base / "log.txt")

    def command(folder: Path) -> tuple[object, ...]:
        files = ("-o", folder / "p.yaml", "--stats-out", folder / "recording.safetensors", "--resume")
        return ("calibrate", model, "--dataset", text, "--target", 0.2, *SIZES, *RULES[rule], *files)

    undisturbed = ended(start(command(base / "whole")))
    assert undisturbed is not None
    status, seconds = undisturbed
    assert status == 0, "an undisturbed run failed"
    whole = contents(base / "whole")
    print(f"{rule}: {seconds:.1f} s for a run that nobody disturbs", file=sys.stderr, flush=True)
    while figures["kills"] < kills:
        folder = base / f"run{figures['runs']}"
        figures["runs"] += 1
        for _ in range(min(PER_RUN, kills - figures["kills"])):
            child = start(command(folder))
            if (end := ended(child, draw.uniform(0, seconds))) is not None:
                figures["lost"] += end[0] != 0
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            figures["kills"] += 1
            figures["corrupt"] += len(corrupt(folder)) if folder.exists() else 0
        end = ended(start(command(folder)))
        figures["lost"] += end is None or end[0] != 0
        found = contents(folder)
        left = {name for name in found if name.endswith(".tmp")}
        figures["left over"] += len(left)
        figures["identical"] += {name: data for name, data in found.items() if name not in left} == whole
    return figures


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else KILLS
    columns = ("kills", "runs", "identical", "corrupt", "lost", "left over")
    print(f"{'rule':<18}" + "".join(f"{name:>11}" for name in columns))
    total: Counter[str] = Counter()
    for number, rule in enumerate(RULES):
        share = wanted // len(RULES) + (number < wanted % len(RULES))
        with tempfile.TemporaryDirectory() as scratch:
            figures = torture(rule, share, Path(scratch), random.Random(number))
        total += figures
        print(f"{rule:<18}" + "".join(f"{figures[name]:>11}" for name in columns), flush=True)
    print(f"{'all':<18}" + "".join(f"{total[name]:>11}" for name in columns))
    sys.exit(0 if total["corrupt"] == total["lost"] == 0 and total["identical"] == total["runs"] else 1)
