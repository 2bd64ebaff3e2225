"""`ffnskip validate`."""

import json
from pathlib import Path

import pytest
from support.cli import run
from support.factories import make_compensated, make_profile

from ffnskip.profiles.profile import dump_profile, save_profile


@pytest.fixture
def good(tmp_path: Path) -> Path:
    save_profile(make_profile(), tmp_path / "good.yaml")
    return tmp_path / "good.yaml"


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    (tmp_path / "bad.yaml").write_text(dump_profile(make_profile()).replace("warm_up: 2", "warm_up: soon"))
    return tmp_path / "bad.yaml"


def test_a_mistake_names_file_field_and_reason_on_stderr_and_all_files_are_checked(
    bad: Path, good: Path, tmp_path: Path
) -> None:
    result = run("validate", bad, tmp_path / "none.yaml", good)
    assert (result.exit_code, result.stdout) == (2, f"ok  {good}\n")
    first, second = result.stderr.splitlines()
    assert first == f'Error: {bad}: skip.warm_up: must be a whole number, not "soon"'
    assert second.startswith(f"Error: {tmp_path / 'none.yaml'}: ")


def test_a_folder_stands_for_every_profile_below_it(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "0.25.yaml", tmp_path / "a" / "b" / "0.5.yaml", tmp_path / "c.yaml"]
    for path in paths:
        save_profile(make_profile(), path)
    (tmp_path / "README.md").write_text("not a profile")
    (tmp_path / "compose.yaml").write_text("services: {}\n")
    result = run("validate", tmp_path)
    assert (result.exit_code, result.stderr) == (0, f"No profiles, and passed over: {tmp_path / 'compose.yaml'}\n")
    assert result.stdout.splitlines() == [f"ok  {path}" for path in paths]


def test_a_weights_file_is_no_profile_and_if_missing_or_altered_a_mistake_of_each_profile_that_names_it(
    tmp_path: Path,
) -> None:
    paths = [tmp_path / "0.01.yaml", tmp_path / "0.02.yaml"]
    for path, threshold in zip(paths, (0.01, 0.02), strict=True):
        save_profile(make_compensated("mean", rule="predicted-damage", threshold=threshold), path)
    (weights,) = tmp_path.glob("*.safetensors")
    result = run("validate", tmp_path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [f"ok  {path}" for path in paths]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    altered = "not the file that the profile was made with, its sha256 is another one"
    for reason in (altered, "cannot be read (No such file or directory), and the profile needs it"):
        result = run("validate", tmp_path)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.splitlines() == [f"Error: {path}: {weights}: {reason}" for path in paths]
        weights.unlink(missing_ok=True)


def test_a_profile_without_its_schema_line_is_judged_and_not_passed_over(good: Path, tmp_path: Path) -> None:
    good.write_text(good.read_text().replace("schema: ffnskip/v1\n", ""))
    result = run("validate", tmp_path)
    assert result.exit_code == 2
    assert "schema" in result.stderr


def test_a_folder_without_profiles_is_a_mistake(tmp_path: Path) -> None:
    result = run("validate", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"Error: {tmp_path}: the folder holds no profile; name a profile.\n"


def test_json_is_one_document_with_a_verdict_for_each_file(good: Path, bad: Path) -> None:
    result = run("validate", good, bad, "--format", "json")
    assert (result.exit_code, result.stderr) == (2, "")
    assert json.loads(result.stdout) == {
        "schema": "ffnskip-validate/v1",
        "files": [
            {"path": str(good), "valid": True, "error": None},
            {"path": str(bad), "valid": False, "error": f'{bad}: skip.warm_up: must be a whole number, not "soon"'},
        ],
    }


@pytest.mark.parametrize(
    "attack", sorted((Path(__file__).parents[1] / "runtime" / "attacks").glob("*.yaml")), ids=lambda path: path.stem
)
def test_hostile_files_are_one_sentence_each(attack: Path) -> None:
    result = run("validate", attack)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"Error: {attack}: ")
    assert len(result.stderr.splitlines()) == 1
