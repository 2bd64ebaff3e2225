"""`ffnskip apply`."""

import json
import shutil
from pathlib import Path

import pytest
from support.cli import mistake, succeed, talk
from support.factories import make_compensated
from transformers import AutoModelForCausalLM

from ffnskip.profiles.identity import model_info
from ffnskip.profiles.profile import load_profile, save_profile


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


def test_json_is_one_document_whose_counts_agree(plateau_folder: Path, plateau_profiles: Path) -> None:
    path = plateau_profiles / "0.30.yaml"
    document = json.loads(succeed("apply", plateau_folder, path, "--format", "json").stdout)
    assert document["schema"] == "ffnskip-apply/v1"
    assert document["model"] == "plateau"
    assert document["threshold"] == load_profile(path).skip.threshold
    layers = document["layers"]
    assert [layer["layer"] for layer in layers] == [2, 3, 4, 5]
    assert 0.2 < document["skip_ratio"] < 0.4
    assert sum(layer["skipped"] for layer in layers) / 8 == pytest.approx(document["skip_ratio"])
    assert sum(layer["first_skipped"] for layer in layers) == pytest.approx(1 - document["never_skip_fraction"])


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


def test_a_target_off_the_curve_or_beside_a_threshold(plateau_folder: Path, plateau_profiles: Path) -> None:
    arguments = ("apply", plateau_folder, plateau_profiles / "0.05.yaml", "--target")
    assert mistake(*arguments, 0.9).endswith("not to 0.9: calibrate for that target instead.")
    assert mistake(*arguments, 0.1, "--threshold", 0.9) == "Give a threshold or a target, not both."


def test_the_verdict_of_a_profile_over_budget_is_repeated(plateau_folder: Path, plateau_profiles: Path) -> None:
    warnings = {
        name: [line for line in talk(succeed("apply", plateau_folder, plateau_profiles / name)) if "Warning" in line]
        for name in ("0.05.yaml", "0.30.yaml")
    }
    measured = load_profile(plateau_profiles / "0.30.yaml").measured
    assert measured
    assert warnings == {"0.05.yaml": [], "0.30.yaml": [f"Warning: This profile is {measured.verdict}."]}


def test_a_profile_for_another_model_is_refused_by_the_field_that_differs(
    plateau_folder: Path, plateau_profiles: Path, pico_folder: Path, tmp_path: Path
) -> None:
    path = plateau_profiles / "0.05.yaml"
    assert mistake("apply", pico_folder, path) == (
        "The profile is for another model: model.n_layers is 8 in the profile (plateau) and 2 in the model."
    )
    other = Path(shutil.copytree(plateau_folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert "model.config_sha256 is" in mistake("apply", other, path)


def test_profiles_that_cannot_be_read(plateau_folder: Path, plateau_profiles: Path, tmp_path: Path) -> None:
    missing, twice = tmp_path / "missing.yaml", tmp_path / "twice.yaml"
    twice.write_text((plateau_profiles / "0.05.yaml").read_text() + "compensation: {kind: none}\n")
    assert mistake("apply", plateau_folder, missing) == f"{missing}: cannot be read (No such file or directory)"
    assert mistake("apply", plateau_folder, twice) == f"{twice}: compensation: the key appears twice; keep one"


def test_a_profile_in_the_place_of_the_model(plateau_profiles: Path) -> None:
    path = plateau_profiles / "0.05.yaml"
    sentence = mistake("apply", path, "demo")
    assert sentence == f"{path} is a profile, and comes second: ffnskip apply MODEL PROFILE."


@pytest.mark.parametrize("threshold", ["nan", "inf", "-inf"])
def test_a_threshold_that_is_not_finite(plateau_folder: Path, plateau_profiles: Path, threshold: str) -> None:
    sentence = mistake("apply", plateau_folder, plateau_profiles / "0.05.yaml", "--threshold", threshold)
    assert sentence == f"The threshold must be a finite number, not {threshold}."


def test_a_model_that_is_not_there(plateau_profiles: Path, tmp_path: Path) -> None:
    model = tmp_path / "none"
    assert mistake("apply", model, plateau_profiles / "0.05.yaml") == f"no such file or folder: {model}"


@pytest.fixture
def damage_profile(plateau_folder: Path, tmp_path: Path) -> Path:
    """A profile of predicted-damage for that model, with random probes, and its weights beside it."""
    info = model_info(AutoModelForCausalLM.from_pretrained(plateau_folder), id="plateau").model_dump()
    settings = info | {"cold_s": 0, "cold_e": 8, "threshold": 1.0, "curve": [[0.5, 0.2, 0.1], [2.0, 0.6, 0.2]]}
    profile = make_compensated("low-rank", rule="predicted-damage", rank=3, neurons=4, **settings)
    save_profile(profile, tmp_path / "damage.yaml")
    return tmp_path / "damage.yaml"


def test_a_profile_of_predicted_damage_proves_itself_with_the_weights_beside_it(
    plateau_folder: Path, damage_profile: Path
) -> None:
    result = succeed("apply", plateau_folder, damage_profile, "--format", "json")
    assert talk(result)[0].startswith("Self-check passed: ")
    document = json.loads(result.stdout)
    assert [layer["layer"] for layer in document["layers"]] == list(range(8))
    assert 0.2 < document["skip_ratio"] < 0.8


def test_the_threshold_of_predicted_damage_is_moved_in_nats(plateau_folder: Path, damage_profile: Path) -> None:
    arguments = ("apply", plateau_folder, damage_profile)
    documents = [
        json.loads(succeed(*arguments, *move, "--format", "json").stdout)
        for move in (("--threshold", 0.0), ("--target", 0.4), ("--threshold", 1e9))
    ]
    assert [document["threshold"] for document in documents] == pytest.approx([0.0, 1.25, 1e9])
    assert [document["skip_ratio"] for document in documents][::2] == [0.0, 1.0]
    assert "is a number of nats and not -1.0" in mistake(*arguments, "--threshold", -1.0)


def test_a_profile_without_its_weights_is_one_sentence(plateau_folder: Path, damage_profile: Path) -> None:
    (weights,) = damage_profile.parent.glob("*.safetensors")
    weights.unlink()
    sentence = mistake("apply", plateau_folder, damage_profile)
    assert sentence == f"{weights}: cannot be read (No such file or directory), and the profile needs it"
