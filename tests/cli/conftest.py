"""What the tests of several commands share."""

from pathlib import Path

import pytest
from support.cli import SMALL
from support.factories import TEXT, make_compensated
from transformers import AutoModelForCausalLM

from ffnskip.profiles.identity import model_info
from ffnskip.profiles.profile import save_profile

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


@pytest.fixture
def damage_profile(plateau_folder: Path, tmp_path: Path) -> Path:
    """A profile of predicted-damage for that model, with random probes, and its weights beside it.

    It says that it was measured on what the model writes.
    """
    info = model_info(AutoModelForCausalLM.from_pretrained(plateau_folder), id="plateau").model_dump()
    settings = info | {"cold_s": 0, "cold_e": 8, "threshold": 1.0, "curve": [[0.5, 0.2, 0.1], [2.0, 0.6, 0.2]]}
    settings["evaluation"] = TEXT | {"dataset": "self", "split": None, "sequence_length": 64}
    profile = make_compensated("low-rank", rule="predicted-damage", rank=3, neurons=4, **settings)
    save_profile(profile, tmp_path / "damage.yaml")
    return tmp_path / "damage.yaml"
