"""What the tests of several commands share."""

from pathlib import Path

import pytest
from support.cli import SMALL

BENCH_SIZES = ("--eval-tokens", 256, "--prompt-tokens", 8, "--new-tokens", 12, "--prompts", 2, "--repetitions", 2)


@pytest.fixture
def calibrate(plateau_folder: Path, text_file: Path) -> tuple[object, ...]:
    """The start of a small calibration's command line."""
    return ("calibrate", plateau_folder, "--dataset", text_file, *SMALL)


@pytest.fixture
def bench(plateau_folder: Path, plateau_profiles: Path, text_file: Path) -> tuple[object, ...]:
    """The start of a command line."""
    options = ("--profile", plateau_profiles / "0.05.yaml", "--eval-dataset", text_file)
    return ("bench", plateau_folder, *options, *BENCH_SIZES)
