"""`ffnskip pack`, and its folders in the place of the model."""

import os
from pathlib import Path

import pytest
from support.cli import bench_document, bench_rows, mistake, succeed, talk

from ffnskip import FfnskipError
from ffnskip_cli.commands import pack_run
from ffnskip_cli.sources.models import loadable_name

PROMPT = ("a cab had", "--max-new-tokens", 24)


@pytest.fixture
def packed(plateau_folder: Path, tmp_path: Path) -> Path:
    """Its model in 8 bits: the down projection's rows of 48 do not fit int4."""
    succeed("pack", plateau_folder, "--weights", "int8", "--output", tmp_path / "packed")
    return tmp_path / "packed"


def test_the_folder_writes_what_the_model_packed_writes(
    packed: Path, plateau_folder: Path, plateau_profiles: Path
) -> None:
    for profile in ((), ("--profile", plateau_profiles / "0.30.yaml")):
        answer = succeed("generate", packed, *PROMPT, *profile)
        original = succeed("generate", plateau_folder, *PROMPT, "--weights", "int8", *profile)
        assert answer.stdout == original.stdout
        assert "Packing" not in answer.stderr
        hint, *warnings, _ = talk(original)
        assert f"ffnskip pack {plateau_folder} --weights int8 -o FOLDER" in hint
        assert talk(answer)[:-1] == warnings  # the profile is that of this model


def test_the_folder_is_measured_as_the_model(packed: Path, bench: tuple[object, ...]) -> None:
    command, _, *options = bench
    document = bench_document(command, packed, *options, "--measure", "speed")
    assert (document["model"], document["path"]) == ("plateau", "fused")
    assert "ffnskip" in bench_rows(document)


def test_int4_is_the_default(pico_folder: Path, tmp_path: Path) -> None:
    said = succeed("pack", pico_folder, "-o", tmp_path / "packed").stderr
    assert "Packing weights to int4" in said
    assert succeed("generate", tmp_path / "packed", "a", "--max-new-tokens", 4).stdout
    assert {os.stat(file).st_mode & 0o777 for file in (tmp_path / "packed").iterdir()} == {0o644}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "PACKED", "a", "--dtype", "float32"), "is packed, and stays as it is: leave --dtype float32 out"),
        (("generate", "PACKED", "a", "--device-map", "auto"), "leave --device-map auto out"),
        (("generate", "PACKED", "a", "--weights", "int8"), "is packed, and stays as it is: leave --weights int8 out"),
        (("pack", "PACKED", "-o", "other"), "packed or quantized already"),
        (("pack", "PACKED", "-o", "PACKED"), "exists already: name another --output"),
        (("pack", "PLATEAU", "-o", "other"), "int4 needs rows of a multiple of 32 numbers, not 48: choose int8"),
        (("pack", "PLATEAU", "-o", "/proc/other"), "/proc/other cannot be written"),
    ],
)
def test_wrong_arguments(
    arguments: tuple[str, ...],
    words: str,
    packed: Path,
    plateau_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"PACKED": packed, "PLATEAU": plateau_folder}
    assert words in mistake(*(places.get(argument, argument) for argument in arguments))
    assert os.listdir(tmp_path) == ["packed"]


def test_what_transformers_loads_by_itself_cannot_be_a_packed_folder(packed: Path) -> None:
    with pytest.raises(FfnskipError, match="is packed, and this command loads models by transformers"):
        loadable_name(str(packed), offline=True)


def test_what_fails_half_way_leaves_nothing(
    plateau_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack_run, "save_packed", full)
    words = mistake("pack", plateau_folder, "--weights", "int8", "-o", tmp_path / "packed")
    assert "packed cannot be written (No space left on device)" in words
    assert os.listdir(tmp_path) == []
