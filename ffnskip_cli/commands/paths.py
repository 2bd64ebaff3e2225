"""Where results may be written, which is checked before anything long begins."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ffnskip.errors import FfnskipError
from ffnskip_cli.calibration.goals import Goal


def output_paths(output: Path | None, model: str, goals: Sequence[Goal]) -> dict[Goal, Path]:
    """Where each goal's profile goes; checked now, because the run is long."""
    if output is None:
        name = os.path.basename(os.path.abspath(model.partition("@")[0]))
        output = Path("profiles", name.lower().removesuffix(".gguf"))
    if output.suffix in (".yaml", ".yml"):
        if len(goals) > 1:
            raise FfnskipError(f"{output} is one file, but there are {len(goals)} targets: name a folder instead.")
        paths = dict.fromkeys(goals, output)
    else:
        paths = {goal: output / goal.file_name for goal in goals}
    for path in paths.values():
        refuse_unwritable(path, "--output")
    return paths


def refuse_unwritable(path: Path, option: str) -> None:
    """Raise FfnskipError for a file that cannot be written."""
    try:
        if path.is_dir():
            raise FfnskipError(f"{path} is a folder: name another {option}.")
        above = next(folder for folder in path.absolute().parents if folder.exists())
        writable = above.is_dir() and os.access(above, os.W_OK)
    except OSError:  # such as a name that is too long
        writable = False
    if not writable:
        raise FfnskipError(f"{path} cannot be written: name another {option}.")
