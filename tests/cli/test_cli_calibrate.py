"""`ffnskip calibrate`."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
from support.cli import PAPER, SMALL, mistake, run, succeed, talk

from ffnskip.profiles.profile import load_profile, parse_profile

NULLS = ["target_flops", "max_kl", "max_perplexity_increase", "window", "refresh_every", "least_skipped"]


def test_a_profile_is_written_that_holds_everything(
    calibrate: tuple[object, ...], text_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "own.yaml"
    result = succeed(*calibrate, "--target", 0.05, "--output", path)
    profile = load_profile(path)
    assert (profile.model.id, len(profile.similarity.mean)) == ("plateau", 8)
    assert (profile.skip.cold_s, profile.skip.cold_e, profile.skip.warm_up) == (2, 6, 4)
    assert (profile.calibration.dataset, profile.evaluation.dataset) == (text_file.name, text_file.name)
    assert (profile.calibration.tokens_used, profile.evaluation.tokens_used) == (1024, 512)
    assert profile.calibration.text_sha256 != profile.evaluation.text_sha256
    assert (profile.measured.within_budget, profile.measured.target_ratio) == (True, 0.05)
    assert profile.skip.threshold in [point.threshold for point in profile.curve]
    assert [folder for folder in (tmp_path, text_file.parent) if str(folder) in path.read_text()] == []
    assert result.stdout.splitlines()[0].split() == ["profile", str(path)]
    assert talk(result)[-1].startswith("Hint: ffnskip bench ")
    assert list(path.parent.iterdir()) == [path]


def test_several_targets_share_one_recording_and_are_one_document_or_a_line_each(
    calibrate: tuple[object, ...], tmp_path: Path
) -> None:
    command = (*calibrate, "--target", "0.05,0.125,0.3", "--output", tmp_path / "three", "--format")
    result = succeed(*command, "json")
    assert result.stderr.count("recording similarities: 0/16") == 1
    document = json.loads(result.stdout)
    assert document["schema"] == "ffnskip-calibrate/v1"
    rows, paths = document["profiles"], sorted((tmp_path / "three").iterdir())
    assert [path.name for path in paths] == ["0.05.yaml", "0.125.yaml", "0.30.yaml"]
    assert [row["path"] for row in rows] == list(map(str, paths))
    for row in rows:
        assert row["calibration_ratio"] == pytest.approx(row["target_ratio"], abs=0.01)
        assert [name for name, value in row.items() if value is None] == NULLS
        assert parse_profile(json.dumps(row["profile"])) == load_profile(row["path"])
    thresholds = [load_profile(path).skip.threshold for path in paths]
    assert thresholds == sorted(thresholds, reverse=True)
    (warning,) = [line for line in talk(result) if f"{paths[2]} is over the quality budget" in line]
    measured = load_profile(paths[2]).measured
    assert warning.startswith(f"Warning: {paths[2]} is over the quality budget: ")
    assert measured.verdict in warning
    assert not measured.within_budget
    lines = list(csv.DictReader(io.StringIO(succeed(*command, "csv").stdout)))
    assert [line["goal"] for line in lines] == ["ratio 0.05", "ratio 0.125", "ratio 0.3"]
    assert [name for name, value in lines[0].items() if value == ""] == ["window", "refresh_every", "least_skipped"]


def test_the_same_command_gives_the_same_bytes_and_another_seed_gives_others(
    calibrate: tuple[object, ...], tmp_path: Path
) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        succeed(*calibrate, "--target", 0.1, "--seed", seed, "--output", tmp_path / f"{name}.yaml")
    one, same, other = ((tmp_path / f"{name}.yaml").read_bytes() for name in ("one", "same", "other"))
    assert one == same
    assert one != other


@pytest.mark.parametrize(
    ("model", "folder"), [("plateau", "plateau"), ("./Own-2.5B", "own-2.5b"), (".", "where-it-is-run")]
)
def test_without_output_profiles_go_to_a_folder_named_after_the_model(
    plateau_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, folder: str
) -> None:
    here = tmp_path / "Where-It-Is-Run"
    here.mkdir()
    monkeypatch.chdir(here)
    if model == ".":
        for file in plateau_folder.iterdir():
            (here / file.name).symlink_to(file)
    else:
        (here / model).symlink_to(plateau_folder)
    succeed("calibrate", model, "--target", 0.1, "--dataset", text_file, *SMALL)
    assert (here / "profiles" / folder / "0.10.yaml").is_file()


def test_settings_reach_the_profile(calibrate: tuple[object, ...], text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    options = ("--cold-s", 1, "--cold-e", 7, "--window", 3, "--refresh-every", 5, "--dtype", "bfloat16", "--seed", 7)
    evaluation = tmp_path / "other.txt"
    evaluation.write_text(text_file.read_text()[::-1])
    succeed(*calibrate, "--target", 0.1, "--output", path, "--eval-dataset", evaluation, *options)
    profile = load_profile(path)
    skip = profile.skip
    assert (skip.cold_s, skip.cold_e, skip.window, skip.refresh_every) == (1, 7, 3, 5)
    assert (profile.calibration.dtype, profile.calibration.seed) == ("bfloat16", 7)
    assert profile.evaluation.dataset == "other.txt"


def test_calibration_on_what_the_model_writes(plateau_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    options = ("--on", "generated", "--dataset", "self", "--tokens", 512, "--eval-tokens", 512)
    succeed("calibrate", plateau_folder, "--target", 0.1, "--output", path, *options, *PAPER)
    calibration = load_profile(path).calibration
    assert (calibration.dataset, calibration.on) == ("self", "generated")


def test_a_shortfall_of_text_is_said_and_recorded_unless_there_is_too_little(
    calibrate: tuple[object, ...], text_file: Path, tmp_path: Path
) -> None:
    path, other = tmp_path / "own.yaml", tmp_path / "other.txt"
    other.write_text(text_file.read_text()[:1000])
    options = ("--eval-dataset", other, "--eval-tokens", 20_000)
    result = succeed(*calibrate, "--target", 0.1, "--output", path, *options)
    (warning,) = [line for line in talk(result) if "asked for" in line]
    evaluation = load_profile(path).evaluation
    assert evaluation.tokens_requested == 20_000
    assert 512 < evaluation.tokens_used <= 1000
    assert warning == (
        f"Warning: 20000 tokens of evaluation text were asked for, and other.txt has only {evaluation.tokens_used}."
    )
    short = tmp_path / "short.txt"
    short.write_text("eleven byte")
    sentence = mistake(*calibrate, "--target", 0.1, "--dataset", short)
    assert "short.txt has only" in sentence
    assert "less than one sequence of 64" in sentence


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "1.5"], "The target 1.5 is not a ratio between 0 and 1"),
        (["--target", "0"], "The target 0 is not a ratio between 0 and 1"),
        (["--target", "nan"], "The target nan is not a ratio between 0 and 1"),
        (["--target", "abc"], "--target abc is not a ratio such as 0.10"),
        (["--target", "0.1,"], "--target 0.1, is not a ratio such as 0.10"),
        (["--target", "0.1,0.10"], "names a ratio twice"),
        (["--target", "0.9"], "layers 0 to 7 allow at most 0.875"),
        (["--dataset", "missing.txt"], "no such file: missing.txt"),
        (["--dataset", "two words"], "neither a file or folder here nor a dataset id"),
        (["--dataset", "wikitext"], "the dataset Salesforce/wikitext is not in the local Hugging Face cache"),
        (["--eval-dataset", "org/own"], "the dataset org/own is not in the local Hugging Face cache"),
        (["--eval-dataset", "demo:de"], "demo:wiki or demo:c4"),
        (["--dtype", "int4"], "unknown dtype 'int4'"),
        (["--device", "toaster"], "device 'toaster' cannot be used here"),
        (["--warm-up", "63"], "--warm-up must be at most 62"),
        (["--sequence-length", "600"], "The model takes at most 512 tokens, but this needs 600"),
        (["--tokens", "60"], "60 tokens are less than one sequence of 64"),
        (["--eval-tokens", "64"], "at least two sequences"),
        (["--tokens", str(2**63)], "larger than any number in a profile"),
        (["--window", str(2**63)], "must be a whole number"),
        (["--cold-s", "5", "--cold-e", "3"], "The skip region [5, 3) is not one"),
        (["--cold-e", "9"], "within the model's 8 layers"),
        (["--on", "generated"], "--sequence-length is 256"),
    ],
)
def test_wrong_options(calibrate: tuple[object, ...], tmp_path: Path, options: list[str], words: str) -> None:
    assert words in mistake(*calibrate, "--target", 0.1, "--output", tmp_path / "own.yaml", *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./missing", "no such file or folder: ./missing"),
        ("org/name", "the model org/name is not in the local Hugging Face cache"),
        ("org/name@main", "the model org/name@main is not in the local Hugging Face cache"),
        ("two words", "neither a file or folder here nor a model id"),
    ],
)
def test_models_that_are_not_there(text_file: Path, tmp_path: Path, model: str, words: str) -> None:
    options = ("--dataset", text_file, "--output", tmp_path / "own.yaml")
    assert words in mistake("calibrate", model, "--target", 0.1, *options)


@pytest.mark.parametrize(
    ("output", "target", "words"),
    [
        ("file", "0.1", "file/0.10.yaml cannot be written"),
        ("file/own.yaml", "0.1", "file/own.yaml cannot be written"),
        ("folder.yaml", "0.1", "folder.yaml is a folder"),
        ("x" * 300 + ".yaml", "0.1", "cannot be written"),
        ("own.yaml", "0.1,0.2", "own.yaml is one file, but there are 2 targets"),
        pytest.param(
            *("locked/new/own.yaml", "0.1", "own.yaml cannot be written: name another --output.\n"),
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere"),
        ),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_the_long_run(
    calibrate: tuple[object, ...], tmp_path: Path, output: str, target: str, words: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "locked").mkdir(mode=0o500)
    result = run(*calibrate, "--target", target, "--output", tmp_path / output)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert result.stderr.startswith("Error: ")
    assert "recording" not in result.stderr
