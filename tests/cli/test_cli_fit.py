"""`ffnskip calibrate` with a fit, which is the default: a profile, and its weights in one file beside it."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.cli import mistake, succeed, talk

from ffnskip.profiles.profile import load_profile

SIZES = ("--tokens", 1024, "--eval-tokens", 256, "--sequence-length", 64, "--fit-tokens", 2048, "--warm-up", 4)
SIZES += ("--rule", "predicted-damage")
PAPER = ("--rule", "cosine", "--compensate", "none", "--candidates", 0)


@pytest.fixture(scope="module")
def calibrate(plateau_folder: Path, text_file: Path) -> tuple[object, ...]:
    """The start of a command line."""
    return ("calibrate", plateau_folder, "--dataset", text_file, *SIZES)


@pytest.fixture(scope="module")
def own(calibrate: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile by nothing but the rule's defaults, alone in its folder with its weights."""
    path = tmp_path_factory.mktemp("default") / "own.yaml"
    succeed(*calibrate, "--target", 0.25, "--output", path)
    return path


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_by_default_it_adds_a_low_rank_map_and_neurons(own: Path) -> None:
    profile = load_profile(own)
    assert sorted(files_in(own.parent)) == sorted([own.name, str(profile.compensation.file)])
    assert (profile.skip.rule, profile.skip.window, profile.skip.warm_up) == ("predicted-damage", None, 4)
    assert (profile.compensation.kind, profile.compensation.rank, profile.compensation.neurons) == ("low-rank", 5, 16)
    assert profile.measured.target_ratio == 0.25
    assert profile.measured.skip_ratio == pytest.approx(0.25, abs=0.03)
    assert (profile.fit.tokens, profile.fit.ratio) == (2048, 0.25)
    thresholds = [point.threshold for point in sorted(profile.curve, key=lambda point: (point.skip_ratio, point))]
    assert thresholds == sorted(thresholds)  # the more damage is allowed, the more is skipped
    assert profile.skip.threshold in thresholds


def test_it_costs_less_than_the_papers_rule_at_the_same_target(
    calibrate: tuple[object, ...], own: Path, tmp_path: Path
) -> None:
    succeed(*calibrate, "--target", 0.25, "--output", tmp_path / "paper.yaml", *PAPER)
    assert sorted(files_in(tmp_path)) == ["paper.yaml"]
    paper = load_profile(tmp_path / "paper.yaml")
    assert (paper.skip.rule, paper.compensation.kind, paper.fit) == ("cosine", "none", None)
    assert load_profile(own).measured.kl < 0.7 * paper.measured.kl


def test_the_same_command_gives_the_same_bytes(calibrate: tuple[object, ...], own: Path, tmp_path: Path) -> None:
    succeed(*calibrate, "--target", 0.25, "--output", tmp_path / "own.yaml")
    assert files_in(tmp_path) == files_in(own.parent)


def test_several_targets_share_one_file_of_weights(calibrate: tuple[object, ...], tmp_path: Path) -> None:
    succeed(*calibrate, "--target", "0.1,0.25,0.4", "--output", tmp_path)
    profiles = [load_profile(tmp_path / name) for name in ("0.10.yaml", "0.25.yaml", "0.40.yaml")]
    assert len({profile.compensation.file for profile in profiles}) == 1
    assert len(files_in(tmp_path)) == 4
    assert {profile.fit.ratio for profile in profiles if profile.fit} == {0.25}  # the loop is closed in the middle
    costs = [profile.measured.kl for profile in profiles]
    assert costs == sorted(costs)


def test_every_command_takes_the_profile_with_its_weights(
    plateau_folder: Path, own: Path, text_file: Path, tmp_path: Path
) -> None:
    quality = ("--measure", "quality", "--eval-tokens", 256, "--eval-dataset", text_file)
    for command in (
        ("generate", plateau_folder, "hello", "--max-new-tokens", 8, "--profile", own),
        ("apply", plateau_folder, own),
        ("bench", plateau_folder, "--profile", own, *quality),
        ("inspect", own),
        ("validate", own),
    ):
        assert succeed(*command).stdout
    alone = tmp_path / "alone.yaml"
    alone.write_bytes(own.read_bytes())
    assert "cannot be read" in mistake("generate", plateau_folder, "hello", "--profile", alone)


@pytest.mark.parametrize(
    "choices", [("linear", "--neurons", 0), ("linear",), ("mean",), ("low-rank", "--rank", 3, "--neurons", 4)], ids=str
)
def test_the_papers_rule_takes_every_compensation(
    calibrate: tuple[object, ...], tmp_path: Path, choices: tuple[object, ...]
) -> None:
    paper = ("--rule", "cosine", "--candidates", 0, "--compensate", *choices)
    succeed(*calibrate, "--target", 0.25, "--output", tmp_path / "own.yaml", *paper)
    profile = load_profile(tmp_path / "own.yaml")
    assert len(files_in(tmp_path)) == 2
    assert (profile.skip.rule, profile.compensation.kind) == ("cosine", choices[0])
    assert profile.compensation.neurons == {0: 0, 1: 16, 4: 4}[{("linear",): 1, ("mean",): 0}.get(choices, choices[-1])]
    assert profile.fit


def test_probes_can_go_without_compensation(calibrate: tuple[object, ...], own: Path, tmp_path: Path) -> None:
    succeed(*calibrate, "--target", 0.25, "--output", tmp_path / "own.yaml", "--compensate", "none")
    profile = load_profile(tmp_path / "own.yaml")
    assert (profile.skip.rule, profile.compensation.kind) == ("predicted-damage", "none")
    assert len(files_in(tmp_path)) == 2
    assert profile.measured.kl > load_profile(own).measured.kl


def test_a_limit_on_kl_holds_on_unseen_text_pins_are_kept_and_a_shortfall_of_text_is_said(
    plateau_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text()[:12_000])
    pins = ("--cold-s", 1, "--cold-e", 7, "--refresh-every", 4, "--compensate", "mean", "--fit-tokens", 20_000)
    texts = ("--dataset", short, "--eval-dataset", text_file, *SIZES)
    result = succeed("calibrate", plateau_folder, *texts, *pins, "--max-kl", 0.02, "--output", tmp_path)
    profile = load_profile(tmp_path / "kl-0.02.yaml")
    assert 0 < profile.measured.kl <= 0.02 + 1e-4
    assert profile.measured.skip_ratio > 0.05
    assert (profile.skip.cold_s, profile.skip.cold_e, profile.skip.refresh_every) == (1, 7, 4)
    (warning,) = [line for line in talk(result) if "asked for" in line]
    assert warning.startswith("Warning: 20000 tokens of fitting text were asked for, and ")


def test_it_can_record_on_what_the_model_writes_and_choose_the_warm_up(
    plateau_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "own.yaml"
    sizes = ("--tokens", 512, "--eval-tokens", 512, "--fit-tokens", 1024, *SIZES[-2:], "--compensate", "mean")
    options = ("--dataset", text_file, "--on", "generated", *sizes, "--output", path)
    succeed("calibrate", plateau_folder, "--target", 0.25, *options)
    profile = load_profile(path)
    assert (profile.skip.rule, profile.calibration.on) == ("predicted-damage", "generated")
    assert profile.skip.warm_up in [trial.warm_up for trial in profile.search.warm_up]


def noted(journal: Path) -> bool:
    """Whether tensors are kept and their hash is in the journal, without which they are not believed."""
    files = journal.parent.glob(f"{journal.name}.*.safetensors")
    return any(hashlib.sha256(file.read_bytes()).hexdigest() in journal.read_text() for file in files)


def test_a_fit_that_was_killed_is_resumed_and_its_recording_solved_again_with_the_same_bytes(
    calibrate: tuple[object, ...], own: Path, tmp_path: Path
) -> None:
    path, recording = tmp_path / "own.yaml", tmp_path / "own.st"
    command = (*calibrate, "--target", 0.25, "--output", path, "--stats-out", recording)
    process = subprocess.Popen(
        [sys.executable, "-m", "ffnskip_cli", *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    patience = time.monotonic() + 60
    while not noted(tmp_path / "own.st.journal") and time.monotonic() < patience:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not path.exists()

    result = succeed(*command, "--resume")
    assert "recording similarities: 0/0" in result.stderr
    assert "taking gradients" not in result.stderr  # they were kept
    made = files_in(own.parent)
    assert files_in(tmp_path) == made | {"own.st": recording.read_bytes()}  # and no journal is left

    path.unlink()
    pruned = [word for word in calibrate if word not in ("--tokens", 1024, "--sequence-length", 64)]
    result = succeed(*pruned, "--target", 0.25, "--output", path, "--stats-in", recording)
    assert "recording similarities" not in result.stderr
    assert path.read_bytes() == own.read_bytes()


def test_a_dry_run_forecasts_the_fit(calibrate: tuple[object, ...], tmp_path: Path) -> None:
    arguments = (*calibrate, "--target", 0.25, "--output", tmp_path / "own.yaml", "--dry-run", "--format", "json")
    forecast = json.loads(succeed(*arguments).stdout)
    passes = {step["step"]: step["passes"] for step in forecast["steps"]}
    assert passes["take gradients"] == 3 * 16  # half of 32 sequences
    assert forecast["memory_bytes"]["fit"] > 0
    assert list(tmp_path.iterdir()) == []
    without = json.loads(succeed(*arguments, *PAPER).stdout)
    assert "fit" not in without["memory_bytes"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--window", 1), "--window belongs to --rule cosine"),
        (("--candidates", 3), "--candidates belongs to --rule cosine"),
        (("--rule", "nosuch"), "There is no rule named nosuch"),
        (("--compensate", "linear", "--rank", 4), "--rank belongs to --compensate low-rank"),
        (("--compensate", "mean", "--neurons", 4), "--neurons belongs to --compensate low-rank or linear"),
        (("--compensate", "none", "--rank", 4), "--rank belongs to --compensate low-rank"),
        (("--neurons", 49), "--neurons 49 is more than the 48 that each FFN of this model has"),
        (("--rank", 33), "--rank 33 is more than the width of the model's stream, 32"),
        (("--fit-tokens", 64), "too few to fit to"),
        (("--fit-tokens", 63), "less than one sequence of 64"),
        (("--fit-tokens", 2**63), "larger than any number in a profile"),
        (("--target", 0.9, "--cold-s", 4), "allow at most 0.500"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence_and_write_nothing(
    calibrate: tuple[object, ...], tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    assert words in mistake(*calibrate, "--target", 0.25, "--output", tmp_path / "own.yaml", *options)
    assert list(tmp_path.iterdir()) == []
