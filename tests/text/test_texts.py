"""The texts of a calibration and of a benchmark, by the names that a user gives or a profile holds."""

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from support.factories import TEXT
from support.sentences import sentence

from ffnskip.errors import FfnskipError
from ffnskip.profiles.evidence import CalibrationText, EvaluationText, TextPart
from ffnskip_cli.calibration.assemble import calibration_text
from ffnskip_cli.calibration.assemble import evaluation_text as evaluation_section
from ffnskip_cli.calibration.recording.collect import identity_of, source_of
from ffnskip_cli.calibration.settings import Goal, Settings
from ffnskip_cli.calibration.texts import held_out_of, text_to_record
from ffnskip_cli.sources.models import LoadedModel, load_model
from ffnskip_cli.text.corpus import Corpus
from ffnskip_cli.text.named import check_names, dataset_names, evaluation_text, text_names

SETTINGS = Settings((Goal("target_ratio", 0.1),), tokens=640, eval_tokens=256, sequence_length=32, warm_up=2)
Write = Callable[..., str]


@pytest.fixture(scope="module")
def loaded(pico_folder: Path) -> LoadedModel:
    return load_model(str(pico_folder))


@pytest.fixture
def file(tmp_path: Path) -> Write:
    """Writes a text file of 64 documents, and returns its path."""

    def write(name: str, seed: int) -> str:
        draw = random.Random(seed)
        lines = ["".join(draw.choices("abcdefgh ", k=2100)) for _ in range(64)]
        (tmp_path / name).write_text("\n\n".join(lines))
        return str(tmp_path / name)

    return write


def both(loaded: LoadedModel, datasets: list[str], evals: Sequence[str] = ()) -> tuple[Corpus, Corpus]:
    text = text_to_record(loaded, datasets, SETTINGS, offline=True)
    identity = identity_of(source_of(loaded), text, SETTINGS)
    return text, held_out_of(loaded, identity, datasets, list(evals), SETTINGS, offline=True)


def part(dataset: str, config: str | None, split: str | None, weight: float) -> TextPart:
    own = {"dataset": dataset, "config": config, "split": split, "tokens_used": 64}
    return TextPart(**own, revision=None, text_sha256="ab" * 32, weight=weight)


def section(dataset: str, config: str | None = None, split: str | None = None, *parts: TextPart) -> EvaluationText:
    return EvaluationText(**TEXT | {"dataset": dataset, "config": config, "split": split, "parts": parts})


def calibrated_on(text: EvaluationText) -> CalibrationText:
    return CalibrationText(**{**dict(text), "seed": 0, "dtype": "float32", "on": "text"})


def shares(corpus: Corpus) -> list[tuple[str, float, int]]:
    return [(part.dataset, part.weight, part.tokens_used) for part in corpus.parts]


def test_weights_are_part_of_the_names_and_parts_stand_in_the_profile(loaded: LoadedModel, file: Write) -> None:
    text, held_out = both(loaded, [f"{file('a.txt', 1)}=3", file("b.txt", 2)])
    assert shares(text) == [("a.txt", 3.0, 480), ("b.txt", 1.0, 160)]
    assert shares(held_out) == [("a.txt", 3.0, 192), ("b.txt", 1.0, 64)]
    assert not text.document_hashes & held_out.document_hashes
    assert calibration_text(text, SETTINGS, "float32").parts == text.parts
    assert evaluation_section(held_out).parts == held_out.parts
    assert dataset_names(evaluation_section(held_out)) == ["a.txt", "b.txt"]


def test_a_path_with_an_equals_sign_is_a_path(loaded: LoadedModel, file: Write) -> None:
    text, _ = both(loaded, [file("rate=3.txt", 1), f"{file('size=1.txt', 2)}=2"])
    assert [(part.dataset, part.weight) for part in text.parts] == [("rate=3.txt", 1.0), ("size=1.txt", 2.0)]


def test_held_out_text_of_other_datasets_has_no_calibration_document(
    loaded: LoadedModel, file: Write, tmp_path: Path
) -> None:
    calibration = [file("a.txt", 1), file("b.txt", 2)]
    shared = tmp_path / "c.txt"
    shared.write_text((tmp_path / "b.txt").read_text())
    text, held_out = both(loaded, calibration, [calibration[0], str(shared)])
    assert [part.dataset for part in held_out.parts] == ["a.txt", "c.txt"]
    assert not text.document_hashes & held_out.document_hashes
    size = {"tokens": 10**6, "sequence_length": 32, "seed": 0}
    everything = evaluation_text(loaded, [str(shared)], calibrated_on=["a.txt", "b.txt"], offline=True, **size)
    assert everything.document_hashes & text.document_hashes  # what the exclusion is for


def test_the_model_writes_its_share_of_a_mixture(loaded: LoadedModel, file: Write) -> None:
    text, held_out = both(loaded, ["self", f"{file('a.txt', 1)}=3"])
    assert shares(text) == [("self", 1.0, 160), ("a.txt", 3.0, 480)]
    assert shares(held_out) == [("self", 1.0, 64), ("a.txt", 3.0, 192)]
    assert not text.document_hashes & held_out.document_hashes


def test_the_held_out_text_of_a_recording(loaded: LoadedModel, file: Write) -> None:
    names = [file("a.txt", 1), f"{file('b.txt', 2)}=2"]
    text, held_out = both(loaded, names)
    source = source_of(loaded)
    identity = identity_of(source, text, SETTINGS)
    again = held_out_of(loaded, identity, names, [], SETTINGS, offline=True)
    assert torch.equal(again.tokens, held_out.tokens)
    with pytest.raises(FfnskipError, match=r"local file a\.txt: name it and the others with --dataset"):
        held_out_of(loaded, identity, [], [], SETTINGS, offline=True)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (section("demo"), ["demo"]),
        (section("demo", "wiki"), ["demo:wiki"]),
        (section("org/own", None, "train"), ["org/own::train"]),
        (section("Salesforce/wikitext", "raw", "test"), ["Salesforce/wikitext:raw:test"]),
        (
            section("mixture", None, None, part("allenai/c4", "en", "train", 3.0), part("self", None, None, 0.1)),
            ["allenai/c4:en:train=3", "self=0.1"],
        ),
    ],
)
def test_a_text_is_found_again_by_what_the_profile_says(text: EvaluationText, names: list[str]) -> None:
    assert text_names(text) == text_names(calibrated_on(text)) == names
    check_names(names, offline=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (section("log.txt"), "measured on the local file log.txt: name it, or another text, with --eval-dataset."),
        (calibrated_on(section("log.txt")), "calibration text was the local file log.txt: name it with --dataset."),
        (
            section("mixture", None, None, part("demo", None, None, 1.0), part("log.txt", None, None, 1.0)),
            "the local file log.txt: name it and the others, or another text, with --eval-dataset.",
        ),
    ],
)
def test_local_files_are_not_found_again(text: EvaluationText, words: str) -> None:
    with pytest.raises(FfnskipError, match=f"{re.escape(words)}$"):
        text_names(text)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["missing.txt=2"], "no such file: missing.txt"),
        (["runs/rate=0.1/a.txt"], "no such file: runs/rate=0.1/a.txt"),
        (["c4="], "the weight '' of c4 is not a number above 0"),
        (["c4=much"], "the weight 'much' of c4"),
        (["c4=0"], "the weight '0' of c4"),
        (["c4=-1"], "the weight '-1' of c4"),
        (["c4=nan"], "the weight 'nan' of c4"),
        (["c4=1e999"], "the weight '1e999' of c4"),
        (["self", "self"], "the text self is named twice"),
        (["self=1", "self=2"], "the text self is named twice"),
        (["wikitext", "Salesforce/wikitext:wikitext-2-raw-v1"], "is named twice"),
        ([f"org/{number}" for number in range(101)], "a mixture of 101 texts is too large"),
    ],
)
def test_names_that_cannot_be_texts(names: list[str], words: str) -> None:
    assert words in sentence(lambda: check_names(names, offline=True))


def test_names_that_can_be_texts_and_a_file_named_twice(
    file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    path = file("a.txt", 1)
    check_names(["self=2", "demo:wiki", "demo:c4=1e-3", "c4:en", "c4:de", "org/x:rate=3:train"], offline=True)
    check_names([path, file("other/a.txt", 2)], offline=True)
    monkeypatch.chdir(tmp_path)
    assert "is named twice" in sentence(lambda: check_names([path, "./a.txt"], offline=True))
