"""What the commands do with a profile that was made on other weights than those at hand."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from support.cli import mistake, succeed, talk
from support.sentences import numbers
from transformers import AutoModelForCausalLM

from ffnskip.errors import ProfileError
from ffnskip.profiles.profile import load_profile, save_profile
from ffnskip_cli.commands.identity import check_identity
from ffnskip_cli.sources.models import load_model

FEW = ("--eval-tokens", 256, "--measure", "quality")


@pytest.fixture
def permuted(plateau_folder: Path, tmp_path: Path) -> Path:
    """The same function as that model's, with the neurons of every layer in another order."""
    folder = Path(shutil.copytree(plateau_folder, tmp_path / "permuted"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
                matrix.weight.copy_(matrix.weight.flip(0))
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight.flip(1))
    model.save_pretrained(folder)
    return folder


def without_fingerprint(path: Path, **known: str) -> Path:
    """A profile of an earlier version, which may know its commit or its GGUF file."""
    profile = load_profile(path)
    old = profile.model.model_copy(update={"weights_sha256": None, **known})
    target = path.with_name("old.yaml")
    save_profile(profile.with_weights(profile.weights).model_copy(update={"model": old}), target)
    return target


def commands(model: Path, profile: Path) -> list[tuple[object, ...]]:
    return [
        ("apply", model, profile),
        ("generate", model, "abc", "--profile", profile, "--max-new-tokens", 4),
        ("generate", model, "abc", "--profile", profile, "--max-new-tokens", 4, "--weights", "int8"),
        ("bench", model, "--profile", profile, *FEW),
    ]


@pytest.mark.parametrize("number", range(4))
def test_other_weights_are_refused_or_measured(permuted: Path, damage_profile: Path, number: int) -> None:
    command = commands(permuted, damage_profile)[number]
    assert "The profile was made on other weights: model.weights_sha256 is " in mistake(*command)
    said = [line for line in talk(succeed(*command, "--other-weights")) if "made on other weights" in line]
    assert len(said) == 1
    assert said[0].startswith("Warning: The profile was made on other weights. On these it costs KL ")
    kl, tokens = numbers(said[0])
    assert float(kl) > 0.05
    assert tokens == "1024"


def test_the_same_weights_are_not_measured_again(plateau_folder: Path, damage_profile: Path) -> None:
    for command in commands(plateau_folder, damage_profile):
        assert not [line for line in talk(succeed(*command, "--other-weights")) if "other weights" in line]


def test_a_profile_without_a_fingerprint_is_taken_with_one_warning(plateau_folder: Path, damage_profile: Path) -> None:
    old = without_fingerprint(damage_profile)
    for command in commands(plateau_folder, old):
        warnings = [line for line in talk(succeed(*command)) if "does not say which weights" in line]
        assert len(warnings) == 1
        assert warnings[0].startswith("Warning: ")


@pytest.mark.parametrize(("field", "digits"), [("revision", 40), ("gguf_sha256", 64)])
def test_a_commit_or_a_gguf_file_stands_in_for_a_missing_fingerprint(
    field: str, digits: int, plateau_folder: Path, damage_profile: Path, recwarn: pytest.WarningsRecorder
) -> None:
    profile = load_profile(without_fingerprint(damage_profile, **{field: "a" * digits}))
    loaded = load_model(str(plateau_folder))
    same = dataclasses.replace(loaded, **{field: "a" * digits})
    check_identity(same, profile, other_weights=False, offline=True)
    assert not recwarn.list
    other = dataclasses.replace(loaded, **{field: "b" * digits})
    with pytest.raises(ProfileError, match=f"^The profile was made on other weights: model.{field} is aaa"):
        check_identity(other, profile, other_weights=False, offline=True)


def test_what_cannot_be_measured_is_said(permuted: Path, damage_profile: Path, tmp_path: Path) -> None:
    profile = load_profile(damage_profile)
    local = profile.evaluation.model_copy(update={"dataset": "log.txt"})
    save_profile(profile.with_weights(profile.weights).model_copy(update={"evaluation": local}), damage_profile)
    said = talk(succeed("apply", permuted, damage_profile, "--other-weights"))
    assert any("what it costs on these is not known: " in line and "log.txt" in line for line in said)
