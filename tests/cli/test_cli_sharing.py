"""Profiles that are shared: `profiles`, `card`, and names on the Hub on the command line."""

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
from support.cli import mistake, run, succeed, talk
from support.factories import CALIBRATION, MEASURED, TEXT, make_profile
from support.hub import COMMIT, cache_repository

from ffnskip.profiles.profile import save_profile


@pytest.fixture
def on_hub(plateau_profiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a repository with two profiles of the plateau model and one of another model."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "repository"
    folder.mkdir()
    for file in plateau_profiles.glob("*.yaml"):
        (folder / file.name).write_bytes(file.read_bytes())
    save_profile(make_profile(), folder / "other.yaml")
    cache_repository(tmp_path / "hub", "org/profiles", folder)
    return "org/profiles"


def test_every_command_takes_a_name_on_the_hub_and_says_the_commit(
    on_hub: str, plateau_folder: Path, plateau_profiles: Path
) -> None:
    name = f"hf://{on_hub}/0.05.yaml"
    exact = f"{name}@{COMMIT}"
    for command in (
        ("inspect", name),
        ("card", name),
        ("diff", plateau_profiles / "0.05.yaml", name),
        ("apply", plateau_folder, name),
        ("generate", plateau_folder, "abc", "--profile", name, "--max-new-tokens", 4),
    ):
        assert f"The profile is {exact}" in talk(succeed(*command))
    assert exact in succeed("validate", on_hub).stdout
    said = mistake("generate", plateau_folder, "abc", "--profile", on_hub)
    assert "holds 3 profiles" in said
    assert exact in said


def test_profiles_lists_what_fits_and_says_why_the_others_do_not(
    on_hub: str, plateau_folder: Path, plateau_profiles: Path
) -> None:
    result = succeed("profiles", plateau_folder, "--from", on_hub, "--format", "json")
    document = json.loads(result.stdout)
    assert document["schema"] == "ffnskip-profiles/v1"
    within = {row["profile"]: row["within_budget"] for row in document["profiles"]}
    assert within == {f"hf://{on_hub}/{file}@{COMMIT}": file == "0.05.yaml" for file in ("0.05.yaml", "0.30.yaml")}
    assert {row["checked"] for row in document["profiles"]} == {"architecture"}
    (other,) = document["others"]
    assert "is for another model" in other["reason"]
    count, reason = talk(result)
    assert count.startswith("2 of 3 profiles in org/profiles fit ")
    assert other["reason"] in reason
    table = succeed("profiles", plateau_folder, "--from", plateau_profiles).stdout
    assert re.findall(r"0\.\d\d\.yaml", table) == ["0.05.yaml", "0.30.yaml"]
    assert "0 of " in talk(succeed("profiles", plateau_folder))[0]  # none is shared for this model


def test_no_model_and_no_place_are_one_sentence_each(plateau_folder: Path) -> None:
    assert "no such file or folder" in mistake("profiles", "./nosuch")
    assert "not in the local Hugging Face cache" in mistake("profiles", plateau_folder, "--from", "org/never-fetched")


def test_auto_without_a_shared_profile_is_one_sentence(plateau_folder: Path) -> None:
    for command in (("generate", plateau_folder, "abc", "--profile", "auto"), ("apply", plateau_folder, "auto")):
        assert "ffnskip calibrate" in mistake(*command)


def test_a_card_has_commands_figures_and_provenance_and_no_more_than_the_profile_says(tmp_path: Path) -> None:
    bare, measured, output = (tmp_path / name for name in ("bare.yaml", "measured.yaml", "card.md"))
    save_profile(make_profile(), bare)
    known = {"measured": MEASURED, "calibration": CALIBRATION, "evaluation": TEXT, "weights_sha256": "ab" * 32}
    save_profile(make_profile(**known), measured)
    succeed("card", measured, "--output", output)
    card = output.read_text()
    assert not card.startswith("---")
    assert str(tmp_path) not in card
    assert len(re.findall(r"^ffnskip .*org/tiny@0123456789.* measured\.yaml$", card, re.MULTILINE)) == 3
    for told in (
        "| 5.2% |",
        "| 0.2000 |",
        "| 90.0% |",
        "| 7 |",
        "| 9.1 |",
        "| 40.0% |",
        "| 2,048 tokens of wikitext:train |",
    ):
        assert told in card
    assert "ab" * 32 in card
    assert "ffnskip 0.1.0" in card
    short = succeed("card", bare).stdout
    assert "KL" not in short
    assert "None" not in short
    assert "calibrated" not in short


def test_a_card_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    save_profile(make_profile(), tmp_path / "p.yaml")
    assert "is a folder" in mistake("card", tmp_path / "p.yaml", "--output", tmp_path)
    assert run("card", tmp_path / "none.yaml").exit_code == 2
