"""`ffnskip validate`."""

import json
from pathlib import Path

import pytest
from support.factories import make_compensated, make_profile
from typer.testing import CliRunner, Result

from ffnskip.profiles.profile import dump_profile, save_profile
from ffnskip_cli.app import app


def validate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["validate", *map(str, arguments)])


@pytest.fixture
def good(tmp_path: Path) -> Path:
    save_profile(make_profile(), tmp_path / "good.yaml")
    return tmp_path / "good.yaml"


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    (tmp_path / "bad.yaml").write_text(dump_profile(make_profile()).replace("warm_up: 2", "warm_up: soon"))
    return tmp_path / "bad.yaml"


def test_a_valid_profile_is_ok(good: Path) -> None:
    result = validate(good)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"ok  {good}\n", "")


def test_a_mistake_names_file_field_and_reason_on_stderr(bad: Path) -> None:
    result = validate(bad)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f'Error: {bad}: skip.warm_up: must be a whole number, not "soon"\n'


def test_all_files_are_checked_even_after_a_mistake(bad: Path, good: Path, tmp_path: Path) -> None:
    result = validate(bad, tmp_path / "none.yaml", good)
    assert result.exit_code == 2
    assert result.stdout == f"ok  {good}\n"
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == [str(bad), str(tmp_path / "none.yaml")]


def test_a_folder_stands_for_every_profile_below_it(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "0.25.yaml", tmp_path / "a" / "b" / "0.5.yaml", tmp_path / "c.yaml"]
    for path in paths:
        save_profile(make_profile(), path)
    (tmp_path / "README.md").write_text("not a profile")
    result = validate(tmp_path)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [f"ok  {path}" for path in paths]


@pytest.fixture
def shared(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of two profiles that share one weights file, and that file."""
    folder = tmp_path / "shared"
    for threshold in (0.01, 0.02):
        profile = make_compensated("mean", rule="predicted-damage", threshold=threshold)
        save_profile(profile, folder / f"{threshold}.yaml")
    (weights,) = folder.glob("*.safetensors")
    return folder, weights


def test_a_weights_file_that_profiles_share_is_no_profile(shared: tuple[Path, Path]) -> None:
    folder, _ = shared
    result = validate(folder)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [f"ok  {folder / '0.01.yaml'}", f"ok  {folder / '0.02.yaml'}"]


def test_a_weights_file_that_is_missing_or_altered_is_a_mistake_of_each_profile_that_names_it(
    shared: tuple[Path, Path],
) -> None:
    folder, weights = shared
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    altered = "not the file that the profile was made with, its sha256 is another one"
    for reason in (altered, "cannot be read (No such file or directory), and the profile needs it"):
        result = validate(folder)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.splitlines() == [
            f"Error: {folder / name}: {weights}: {reason}" for name in ("0.01.yaml", "0.02.yaml")
        ]
        weights.unlink(missing_ok=True)


def test_a_folder_without_profiles_is_a_mistake(tmp_path: Path) -> None:
    result = validate(tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"Error: {tmp_path}: the folder holds no .yaml file; name a profile.\n"


def test_json_is_one_document_with_a_verdict_for_each_file(good: Path, bad: Path) -> None:
    result = validate(good, bad, "--format", "json")
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
    result = validate(attack)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"Error: {attack}: ")
    assert len(result.stderr.splitlines()) == 1
