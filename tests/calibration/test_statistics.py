"""The recording as a file: what comes back, what belongs together, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from support.factories import TEXT, make_profile
from torch import Tensor

from ffnskip import FfnskipError
from ffnskip.profiles.evidence import CalibrationText
from ffnskip_cli.calibration.recording.file import Identity, Source, Statistics, load_statistics, refuse_difference
from ffnskip_cli.calibration.recording.record import Record

SEQUENCES, LENGTH, LAYERS = 5, 8, 6
DOCUMENTS = frozenset({b"\x00" * 32, b"\xff" * 32})


def identity(**changes: Any) -> Identity:
    sizes = {"tokens_used": SEQUENCES * LENGTH, "sequence_length": LENGTH}
    text = TEXT | sizes | {"text_sha256": "ab" * 32, "seed": 0, "dtype": "float32", "on": "text"}
    source = Source(make_profile().model, "cd" * 32, "ef" * 32, "float32")
    text |= {name: value for name, value in changes.items() if name in text}
    source = replace(source, **{name: value for name, value in changes.items() if hasattr(source, name)})
    return Identity(source, CalibrationText.model_validate(text), DOCUMENTS, changes.get("tokens_sha256", "aa" * 32))


def recording() -> Record:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1000, (SEQUENCES, LENGTH), generator=generator)
    return Record(tokens, torch.rand(SEQUENCES, LENGTH, LAYERS, generator=generator))


def part(places: list[int], whole: Record, **changes: Any) -> Statistics:
    statistics = Statistics(identity(**changes))
    index = torch.tensor(places)
    statistics.put(index, Record(whole.sequences[index], whole.values[index]))
    return statistics


def save_each(folder: Path, *parts: Statistics) -> list[Path]:
    paths = [folder / f"{number}.safetensors" for number in range(len(parts))]
    for statistics, path in zip(parts, paths, strict=True):
        statistics.save(path)
    return paths


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4]], [[4, 0], [2], [1, 3]], [[1, 3], [4, 0], [2]]])
def test_parts_that_were_saved_are_in_any_order_the_whole_bit_for_bit(tmp_path: Path, parts: list[list[int]]) -> None:
    whole = recording()
    paths = save_each(tmp_path / "new", *(part(places, whole) for places in parts))
    loaded = load_statistics(paths)
    assert (loaded.identity, loaded.missing) == (identity(), 0)
    assert torch.equal(loaded.record.sequences.long(), whole.sequences)
    assert torch.equal(loaded.record.values, whole.values)
    assert sorted((tmp_path / "new").iterdir()) == paths


def test_a_part_knows_what_it_lacks_and_holds_no_more_than_it_has(tmp_path: Path) -> None:
    (some, none) = save_each(tmp_path, part([3], recording()), Statistics(identity()))
    assert load_statistics([some]).missing == SEQUENCES - 1
    assert load_statistics([some]).done.tolist() == [0, 0, 0, 1, 0]
    assert load_statistics([none]).missing == SEQUENCES
    assert some.stat().st_size - none.stat().st_size < 2 * LENGTH * (LAYERS + 1) * 4


def test_a_sequence_that_two_files_hold_is_refused(tmp_path: Path) -> None:
    paths = save_each(tmp_path, part([0, 1], recording()), part([1, 2], recording()))
    with pytest.raises(
        FfnskipError, match=r"^\S+1\.safetensors holds sequences that the other files hold, too: [^\n]+$"
    ):
        load_statistics(paths)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"model": make_profile(hidden_size=64).model}, "model.hidden_size is 64 and not 32"),
        ({"weights_sha256": "00" * 32}, "weights_sha256 is 0000"),
        ({"tokenizer_sha256": "00" * 32}, "tokenizer_sha256 is 0000"),
        ({"dtype": "bfloat16"}, "dtype is bfloat16 and not float32"),
        ({"text_sha256": "00" * 32}, "text.text_sha256 is 0000"),
        ({"seed": 1}, "text.seed is 1 and not 0"),
        ({"tokens_sha256": "00" * 32}, "tokens_sha256 is 0000"),
    ],
)
def test_recordings_of_different_things_are_kept_apart(tmp_path: Path, change: dict[str, Any], fact: str) -> None:
    other = Statistics(identity(**change))
    other.done[2:] = 1
    paths = save_each(tmp_path, part([0, 1], recording()), other)
    with pytest.raises(FfnskipError, match=rf"^\S+1\.safetensors does not fit \S+0\.safetensors: {fact}[^\n]*\.$"):
        load_statistics(paths)


def test_a_recording_of_another_model_is_told_from_the_model_alone() -> None:
    refuse_difference(identity().source.facts(), identity(seed=5).source.facts(), "the model", "the file")
    other = identity(weights_sha256="00" * 32).source.facts()
    with pytest.raises(FfnskipError, match=r"^the file does not fit the model: weights_sha256 is 0000"):
        refuse_difference(identity().source.facts(), other, "the model", "the file")


def other_contents(kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    facts = identity().facts()
    tensors = {
        "places": torch.tensor([0]),
        "sequences": torch.zeros(1, LENGTH, dtype=torch.int32),
        "similarities": torch.zeros(1, LENGTH, LAYERS),
        "documents": torch.zeros(1, 32, dtype=torch.uint8),
    }
    match kind:
        case "other tensors":
            del tensors["places"]
        case "other version":
            facts["schema"] = "ffnskip-stats/v9"
        case "shape":
            tensors["similarities"] = torch.zeros(1, LENGTH, LAYERS + 1)
        case "places":
            tensors["places"] = torch.tensor([SEQUENCES])
        case "text":
            facts["text"]["dataset"] = "/etc/passwd"
    return tensors, facts


@pytest.mark.parametrize(
    "kind", ["noise", "cut", "other tensors", "other version", "shape", "places", "text", "folder"]
)
def test_a_file_that_is_no_recording_is_one_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "own.safetensors"
    tensors, facts = other_contents(kind)
    contents = save(tensors, metadata={"ffnskip": json.dumps(facts)})
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes({"noise": b"no safetensors", "cut": contents[:-5]}.get(kind, contents))
    with pytest.raises(FfnskipError, match=r"^\S+ is no statistics file of this version \([^\n]+\)\.$"):
        load_statistics([path])


def test_others_may_read_a_recording_as_they_may_any_file(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    (path,) = save_each(tmp_path, part([0], recording()))
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_recording_that_cannot_be_read_or_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FfnskipError, match=r"^There is no statistics file \S+: record one with --stats-out\.$"):
        load_statistics([tmp_path / "none"])
    (tmp_path / "file").touch()
    with pytest.raises(FfnskipError, match=r"^The statistics cannot be written to [^\n]+\.$"):
        Statistics(identity()).save(tmp_path / "file" / "own.safetensors")
