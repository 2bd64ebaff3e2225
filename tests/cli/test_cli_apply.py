"""`ffnskip apply`."""

import json
import shutil
from pathlib import Path

import pytest
from support.cli import mistake, succeed, talk

from ffnskip.profiles.profile import load_profile


def test_the_self_check_is_reported_and_every_layer_of_the_region_is_listed(
    plateau_folder: Path, plateau_profiles: Path
) -> None:
    result = succeed("apply", plateau_folder, plateau_profiles / "0.05.yaml")
    rows = [line.split() for line in result.stdout.splitlines()[2:] if line]
    assert [row[0] for row in rows] == ["2", "3", "4", "5"]
    said = talk(result)
    assert said[0].startswith("Self-check passed: ")
    assert "skip_ratio 0." in said[1]
    assert said[2].startswith(f"Hint: ffnskip generate {plateau_folder} 'Once upon a time' --profile ")
    assert len(said) == 3


def test_json_is_one_document_whose_counts_agree_and_a_verdict_over_budget_is_repeated(
    plateau_folder: Path, plateau_profiles: Path
) -> None:
    path = plateau_profiles / "0.30.yaml"
    profile, result = load_profile(path), succeed("apply", plateau_folder, path, "--format", "json")
    document = json.loads(result.stdout)
    assert (document["schema"], document["model"]) == ("ffnskip-apply/v1", "plateau")
    assert document["threshold"] == profile.skip.threshold
    layers = document["layers"]
    assert [layer["layer"] for layer in layers] == [2, 3, 4, 5]
    assert 0.2 < document["skip_ratio"] < 0.4
    assert sum(layer["skipped"] for layer in layers) / 8 == pytest.approx(document["skip_ratio"])
    assert sum(layer["first_skipped"] for layer in layers) == pytest.approx(1 - document["never_skip_fraction"])
    warnings = [line for line in talk(result) if "Warning" in line]
    assert warnings == [f"Warning: This profile is {profile.measured.verdict}."]


@pytest.mark.parametrize(("threshold", "ratio", "never"), [("2.0", 0.0, 1.0), ("-1.0", 3 / 8, 0.0)])
def test_the_threshold_can_be_replaced(
    plateau_folder: Path, plateau_profiles: Path, threshold: str, ratio: float, never: float
) -> None:
    options = ("--threshold", threshold, "--format", "json")
    result = succeed("apply", plateau_folder, plateau_profiles / "0.05.yaml", *options)
    assert talk(result)[-1].endswith(f" --threshold {threshold}")
    document = json.loads(result.stdout)
    assert document["threshold"] == float(threshold)
    assert document["tokens"] > 0
    assert (document["skip_ratio"], document["never_skip_fraction"]) == (ratio, never)


def test_a_target_gives_the_threshold_of_the_curve(plateau_folder: Path, plateau_profiles: Path) -> None:
    path = plateau_profiles / "0.05.yaml"
    result = succeed("apply", plateau_folder, path, "--target", 0.2, "--format", "json")
    document = json.loads(result.stdout)
    threshold, _, kl = load_profile(path).point_at(0.2)
    assert document["threshold"] == threshold
    assert document["skip_ratio"] == pytest.approx(0.2, abs=0.1)
    assert any("At ratio 0.2 " in line and f"KL {kl:.3f}" in line for line in talk(result))
    assert talk(result)[-1].endswith(f"--profile {path} --target 0.2")


def test_mistakes_are_one_sentence_each(
    plateau_folder: Path, plateau_profiles: Path, pico_folder: Path, tmp_path: Path
) -> None:
    path, missing, twice = plateau_profiles / "0.05.yaml", tmp_path / "missing.yaml", tmp_path / "twice.yaml"
    twice.write_text(path.read_text() + "compensation: {kind: none}\n")
    finite = "The threshold must be a finite number, not"
    for arguments, sentence in (
        ((plateau_folder, path, "--target", 0.9), "not to 0.9: calibrate for that target instead."),
        ((plateau_folder, path, "--target", 0.1, "--threshold", 0.9), "Give a threshold or a target, not both."),
        *(((plateau_folder, path, "--threshold", value), f"{finite} {value}.") for value in ("nan", "inf", "-inf")),
        ((plateau_folder, missing), f"{missing}: cannot be read (No such file or directory)"),
        ((plateau_folder, twice), f"{twice}: compensation: the key appears twice; keep one"),
        ((path, "demo"), f"{path} is a profile, and comes second: ffnskip apply MODEL PROFILE."),
        ((tmp_path / "none", path), f"no such file or folder: {tmp_path / 'none'}"),
        ((pico_folder, path), "another model: model.n_layers is 8 in the profile (plateau) and 2 in the model."),
    ):
        assert mistake("apply", *arguments).endswith(sentence)
    other = Path(shutil.copytree(plateau_folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert "model.config_sha256 is" in mistake("apply", other, path)


def test_a_profile_of_predicted_damage_needs_its_weights_and_its_threshold_is_moved_in_nats(
    plateau_folder: Path, damage_profile: Path
) -> None:
    arguments, as_json = ("apply", plateau_folder, damage_profile), ("--format", "json")
    result = succeed(*arguments, *as_json)
    assert talk(result)[0].startswith("Self-check passed: ")
    assert [layer["layer"] for layer in json.loads(result.stdout)["layers"]] == list(range(8))
    assert 0.2 < json.loads(result.stdout)["skip_ratio"] < 0.8
    moves = (("--threshold", 0.0), ("--target", 0.4), ("--threshold", 1e9))
    documents = [json.loads(succeed(*arguments, *move, *as_json).stdout) for move in moves]
    assert [document["threshold"] for document in documents] == pytest.approx([0.0, 1.25, 1e9])
    assert [document["skip_ratio"] for document in documents][::2] == [0.0, 1.0]
    assert "is a number of nats and not -1.0" in mistake(*arguments, "--threshold", -1.0)
    (weights,) = damage_profile.parent.glob("*.safetensors")
    weights.unlink()
    sentence = f"{weights}: cannot be read (No such file or directory), and the profile needs it"
    assert mistake(*arguments) == sentence
