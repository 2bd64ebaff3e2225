"""`ffnskip calibrate` on several machines, after a kill, and for several targets: the same bytes in the end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.cli import mistake, run, succeed, talk

from ffnskip_cli.calibration.recording.file import load_statistics

SIZES = ("--tokens", 1024, "--sequence-length", 64)
EVALUATION = ("--eval-tokens", 256)
GOAL = ("--target", 0.1, "--candidates", 5, "--warm-up", 4, "--rule", "cosine", "--compensate", "none")


@pytest.fixture(scope="module")
def undisturbed(plateau_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the profile own.yaml and the recording own.st of one run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    files = ("--output", folder / "own.yaml", "--stats-out", folder / "own.st")
    succeed("calibrate", plateau_folder, "--dataset", text_file, *SIZES, *EVALUATION, *GOAL, *files)
    return folder


@pytest.fixture
def calibrate(plateau_folder: Path, text_file: Path) -> tuple[object, ...]:
    """The start of a command line."""
    return ("calibrate", plateau_folder, "--dataset", text_file)


def test_a_recording_is_solved_for_other_targets_without_running_it_again(
    calibrate: tuple[object, ...], undisturbed: Path, tmp_path: Path
) -> None:
    assert sorted(path.name for path in undisturbed.iterdir()) == ["own.st", "own.yaml"]
    assert load_statistics([undisturbed / "own.st"]).missing == 0
    recording = ("--stats-in", undisturbed / "own.st")
    result = succeed(*calibrate, *EVALUATION, *GOAL, *recording, "--output", tmp_path / "own.yaml")
    assert "recording similarities: " not in result.stderr
    assert (tmp_path / "own.yaml").read_bytes() == (undisturbed / "own.yaml").read_bytes()
    several = (*GOAL, "--target", "0.05,0.2", "--candidates", 0, "--output", tmp_path)
    succeed(*calibrate, *EVALUATION, *recording, *several)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.05.yaml", "0.20.yaml", "own.yaml"]


def test_shards_are_the_whole(calibrate: tuple[object, ...], undisturbed: Path, tmp_path: Path) -> None:
    parts = [tmp_path / f"{number}.st" for number in (1, 2, 3)]
    for number, path in enumerate(parts, start=1):
        result = succeed(*calibrate, *SIZES, *EVALUATION, "--shard", f"{number}/3", "--stats-out", path)
        assert result.stdout == ""
        assert any(line.startswith(("Recorded 5 of 16 ", "Recorded 6 of 16 ")) for line in talk(result))
    solve = (*calibrate, *EVALUATION, *GOAL, "--output", tmp_path / "own.yaml")
    lacking = mistake(*solve, "--stats-in", parts[0], "--stats-in", parts[2])
    assert lacking.startswith("The recording lacks 5 of 16 sequences: ")
    merged = tmp_path / "merged.st"
    succeed(*solve, *(word for path in reversed(parts) for word in ("--stats-in", path)), "--stats-out", merged)
    assert (tmp_path / "own.yaml").read_bytes() == (undisturbed / "own.yaml").read_bytes()
    assert load_statistics([merged]).missing == 0


def command_line(arguments: tuple[object, ...]) -> list[str]:
    return ["-m", "ffnskip_cli", *(str(argument) for argument in arguments)]


def test_killing_a_calibration_and_resuming_it_gives_the_same_bytes(
    calibrate: tuple[object, ...], undisturbed: Path, tmp_path: Path
) -> None:
    files = ("--output", tmp_path / "own.yaml", "--stats-out", tmp_path / "own.st")
    command = (*calibrate, *SIZES, *EVALUATION, *GOAL, *files)
    process = subprocess.Popen(
        [sys.executable, *command_line(command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    journal, patience = tmp_path / "own.st.journal", time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 20) and time.monotonic() < patience:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    measured = journal.read_bytes().count(b"\n")
    assert measured > 20
    assert not (tmp_path / "own.yaml").exists()
    assert mistake(*command).endswith("go on with it by --resume, solve it by --stats-in, or name another --stats-out.")
    result = succeed(*command, "--resume")
    assert "recording similarities: 0/0" in result.stderr
    assert (tmp_path / "own.yaml").read_bytes() == (undisturbed / "own.yaml").read_bytes()
    assert not journal.exists()


def test_a_goal_that_cannot_be_reached_leaves_what_was_measured_for_another(
    calibrate: tuple[object, ...], undisturbed: Path, tmp_path: Path
) -> None:
    files = ("--output", tmp_path / "own.yaml", "--stats-out", tmp_path / "own.st")
    command, journal = (*calibrate, *SIZES, *EVALUATION, *files), tmp_path / "own.st.journal"
    assert "No threshold was found" in run(*command, *GOAL[2:], "--max-kl", 1e-9).stderr
    assert journal.read_bytes().count(b"\n") > 5
    succeed(*command, *GOAL, "--resume")
    assert (tmp_path / "own.yaml").read_bytes() == (undisturbed / "own.yaml").read_bytes()
    assert not journal.exists()


def test_resume_refuses_what_differs(calibrate: tuple[object, ...], undisturbed: Path, tmp_path: Path) -> None:
    recording = tmp_path / "own.st"
    recording.write_bytes((undisturbed / "own.st").read_bytes())
    command = (*calibrate, *EVALUATION, *GOAL, "--output", tmp_path / "own.yaml", "--stats-out", recording, "--resume")
    assert "text.seed is 0 and not 1" in mistake(*command, *SIZES, "--seed", 1)
    assert "dtype is float32 and not bfloat16" in mistake(*command, *SIZES, "--dtype", "bfloat16")
    assert "text.sequence_length is 64 and not 32" in mistake(*command, "--tokens", 1024, "--sequence-length", 32)
    assert recording.read_bytes() == (undisturbed / "own.st").read_bytes()


def test_two_ranks_give_the_same_bytes_as_one(calibrate: tuple[object, ...], undisturbed: Path, tmp_path: Path) -> None:
    command = command_line((*calibrate, *SIZES, *EVALUATION, *GOAL, "--output", tmp_path / "own.yaml"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([*torchrun, *command], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("recording similarities: 0/8\n") == 1  # the other rank is silent
    assert ran.stdout.count("asked for") == 1
    assert (tmp_path / "own.yaml").read_bytes() == (undisturbed / "own.yaml").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokens", "2048"], "The recording was made with --tokens 1024: leave --tokens out."),
        (["--on", "generated"], "The recording was made with --on text: leave --on out."),
        (["--seed", "3"], "The recording was made with --seed 0: leave --seed out."),
        (["--dtype", "float16"], "dtype is float32 and not float16"),
        (["--stats-in", "OWN"], "holds sequences that the other files hold, too"),
        (["--shard", "1/2"], "--shard only records: give the target when you solve"),
        (["--resume"], "--resume needs the --stats-out file to go on with."),
        (["--stats-in", "none.st"], "There is no statistics file none.st: record one with --stats-out."),
    ],
)
def test_what_does_not_go_with_a_recording(
    calibrate: tuple[object, ...], undisturbed: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    own = str(undisturbed / "own.st")
    extra = [own if option == "OWN" else option for option in options]
    command = (*calibrate, *EVALUATION, *GOAL, "--output", tmp_path / "own.yaml", "--stats-in", own)
    assert words in mistake(*command, *extra)


def test_a_shard_is_one_of_several_and_needs_a_file(calibrate: tuple[object, ...], tmp_path: Path) -> None:
    assert mistake(*calibrate, "--shard", "1/2").startswith("--shard records to a file of its own: ")
    for shard in ("0/2", "3/2", "1", "a/b", "1/0", "-1/2"):
        sentence = mistake(*calibrate, f"--shard={shard}", "--stats-out", tmp_path / "own.st")
        assert "is not I/N with I from 1 to N" in sentence


def test_a_recording_of_another_model_or_text_is_refused(
    plateau_folder: Path, pico_folder: Path, text_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    recording, other = undisturbed / "own.st", tmp_path / "other.txt"
    other.write_text("something else\n" * 1000)
    options = (*GOAL, "--stats-in", recording, "--output", tmp_path / "own.yaml", "--dataset")
    sentence = mistake("calibrate", pico_folder, *options, text_file)
    assert sentence.startswith(f"{recording} does not fit the model: ")
    assert mistake("calibrate", plateau_folder, *options, other).startswith("The recording is of log.txt, and what")


def test_a_dry_run_says_what_would_run_and_runs_none_of_it(calibrate: tuple[object, ...], tmp_path: Path) -> None:
    options = (*SIZES, *EVALUATION, *GOAL, "--output", tmp_path / "own.yaml", "--stats-out", tmp_path / "own.st")
    result = succeed(*calibrate, *options, "--dry-run", "--format", "json")
    forecast = json.loads(result.stdout)
    assert forecast["schema"] == "ffnskip-forecast/v1"
    recording = forecast["steps"][0]
    assert (recording["step"], recording["passes"], recording["tokens"]) == ("record similarities", 16, 1024)
    assert all(step["minutes"] > 0 for step in forecast["steps"])
    assert forecast["memory_bytes"]["recording"] == 2 * 1024 * (8 * 4 + 4)  # a copy while it is saved
    assert list(tmp_path.iterdir()) == []
    table = succeed(*calibrate, *options, "--dry-run").stdout
    assert "record similarities" in table
    assert "Memory" in table


def test_ctrl_c_says_how_to_go_on(
    calibrate: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ffnskip_cli.calibration.rules.cosine.compiler.CosineCompiler.choose", interrupt)
    options = (*SIZES, *EVALUATION, *GOAL, "--output", tmp_path / "own.yaml", "--stats-out", tmp_path / "own.st")
    result = run(*calibrate, *options)
    assert result.exit_code == 130
    assert talk(result)[-1].startswith("Hint: What is finished is kept: the same command with --resume goes on")
    monkeypatch.undo()
    assert "recording similarities: 0/0" in succeed(*calibrate, *options, "--resume").stderr
