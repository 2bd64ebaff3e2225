import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.sentences import sentence

from ffnskip_cli.text import sources
from ffnskip_cli.text.sources import group_paragraphs, open_text

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_rows(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(spec: str) -> list[str]:
    return list(open_text(spec).documents())


def test_paragraphs_are_joined_up_to_the_wanted_size() -> None:
    assert list(group_paragraphs(["aaa\n", " \n", "bb\n", "c\n", "dddd\n", "e\n"], 5)) == ["aaa\nbb", "c\ndddd", "e"]


@given(st.lists(st.text(st.sampled_from("ab \n"), max_size=90)), st.integers(1, 8))
def test_grouping_keeps_every_word_in_order(paragraphs: list[str], size: int) -> None:
    documents = list(group_paragraphs(paragraphs, size))
    assert "".join("".join(documents).split()) == "".join("".join(paragraphs).split())
    assert all(len(document) >= size for document in documents[:-1])
    assert all(len(document) <= 6 * size + document.count("\n") for document in documents)


def test_a_huge_paragraph_is_cut_at_spaces() -> None:
    words = ["word"] * 50
    documents = list(group_paragraphs([" ".join(words)], 10))
    assert len(documents) > 5
    assert " ".join(documents).split() == words


def test_txt_file_becomes_documents(tmp_path: Path) -> None:
    paragraphs = [f"{number} " + "x" * 900 for number in range(5)]
    (tmp_path / "notes.txt").write_text("\ufeff" + "\n\n".join(paragraphs) + "\n")
    source = open_text(str(tmp_path / "notes.txt"))
    assert (source.dataset, source.config, source.split, source.revision) == ("notes.txt", None, None, None)
    assert list(source.documents()) == ["\n".join(paragraphs[:3]), "\n".join(paragraphs[3:])]
    assert list(source.documents()) == list(source.documents())


def test_jsonl_rows_are_stripped_and_blank_ones_dropped(tmp_path: Path) -> None:
    spec = write_rows(tmp_path / "a[1].jsonl", {"text": " one\n"}, {"text": None}, {"text": "  "}, {"text": "two"})
    assert read(spec) == ["one", "two"]


def test_parquet_and_empty_files(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).touch()
        assert read(str(tmp_path / name)) == []
    datasets.Dataset.from_dict({"n": [1, 2], "text": ["one", "two"]}).to_parquet(tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet")) == ["one", "two"]


@pytest.mark.parametrize(
    ("row", "document"),
    [
        ({"question": "Why?", "answer": "So."}, "Why?\nSo."),
        ({"text": "taken", "question": "Why?", "answer": "So."}, "taken"),
        ({"id": 7, "body": "only string"}, "only string"),
    ],
)
def test_the_column_that_holds_text(tmp_path: Path, row: dict[str, object], document: str) -> None:
    assert read(write_rows(tmp_path / "rows.jsonl", row)) == [document]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"title": "a", "body": "b"}, "only title, body"),
        ({"number": 1}, "only number"),
        ({"text": 5}, "convert it to strings"),
        ({"text": ["a", "b"]}, "convert it to strings"),
    ],
)
def test_rows_without_text(tmp_path: Path, row: dict[str, object], words: str) -> None:
    spec = write_rows(tmp_path / "rows.jsonl", row)
    message = sentence(lambda: read(spec))
    assert words in message
    assert "rows.jsonl" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "no readable .jsonl"),
        ("a.jsonl", b'{"text": "a"}\n{nope', "no readable .jsonl"),
        ("a.jsonl", b'null\n{"text": "a"}', "line 1 is no object"),
        ("a.jsonl", b'{"text": "a"}\n\n["b"]', "line 3 is no object"),
        ("a.jsonl", b"[" * 100_000, "no readable .jsonl"),
        ("a.parquet", b"not parquet", "no readable .parquet"),
        ("a.csv", b"text\na\n", "name a .txt, .jsonl or .parquet"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert words in sentence(lambda: read(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("missing.txt", "no such file"),
        ("./missing", "no such file"),
        ("some/deep/path", "no such file"),
        ("x" * 5000 + ".txt", "no such file"),
        (".", "cannot be read as text"),
        ("demo:de", "demo:wiki or demo:c4"),
        ("self", "sampled from the model"),
        ("org/name:config:split:more", "too many parts"),
        ("two words", "neither a file"),
        ("", "neither a file"),
    ],
)
def test_wrong_names(spec: str, words: str) -> None:
    assert words in sentence(lambda: open_text(spec))


@pytest.mark.parametrize(
    ("spec", "dataset"),
    [("wikitext", "Salesforce/wikitext"), ("c4:de", "allenai/c4"), ("gsm8k", "openai/gsm8k"), ("org/own", "org/own")],
)
def test_hub_datasets_that_are_not_cached_while_offline(spec: str, dataset: str) -> None:
    message = sentence(lambda: read(spec))
    assert f"the dataset {dataset} is not in the local Hugging Face cache" in message
    assert "`demo`" in message
    message = sentence(lambda: read("wikitxt"))
    assert message.startswith("wikitxt is neither a local .txt, .jsonl or .parquet file, `demo`, `self` nor a Hub id ")
    assert "no dataset of the Hub with so short an id is in the local cache: check the spelling" in message


def test_self_uses_the_given_generator() -> None:
    source = open_text("self", generate=lambda: iter([" one ", "", "two"]))
    assert (source.dataset, source.shuffled) == ("self", True)
    assert list(source.documents()) == ["one", "two"]


class FakeHub:
    """The two calls that reach the Hub; every dataset has the same rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, str]]) -> None:
        self.rows = rows
        self.loaded: list[tuple[Any, ...]] = []
        monkeypatch.setattr(sources, "is_offline_mode", lambda: False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # set by each reading: restored after the test
        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *args, **kwargs: SimpleNamespace(sha=COMMIT))
        monkeypatch.setattr(datasets, "load_dataset", self.load_dataset)

    def load_dataset(self, name: str, config: str | None, *, split: str, revision: str, streaming: bool) -> Any:
        assert streaming
        self.loaded.append((name, config, split, revision))
        return iter(self.rows)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("wikitext", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
        ("wikitext:wikitext-103-raw-v1:test", ("Salesforce/wikitext", "wikitext-103-raw-v1", "test")),
        ("c4::validation", ("allenai/c4", "en", "validation")),
        ("gsm8k", ("openai/gsm8k", "main", "train")),
        ("org/own", ("org/own", None, "train")),
        ("org/own:small:test", ("org/own", "small", "test")),
    ],
)
def test_hub_names(monkeypatch: pytest.MonkeyPatch, spec: str, expected: tuple[str | None, ...]) -> None:
    hub = FakeHub(monkeypatch, [{"text": "row"}])
    source = open_text(spec)
    assert (source.dataset, source.config, source.split, source.revision) == (*expected, COMMIT)
    assert hub.loaded == []
    assert list(source.documents()) == ["row"]
    assert hub.loaded == [(*expected, COMMIT)]


def test_wikitext_rows_are_grouped_and_other_rows_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [" = Title = \n", "", "x" * 1500, "y" * 1500, "z"]
    FakeHub(monkeypatch, [{"text": row} for row in rows])
    assert read("wikitext") == ["= Title =\n" + rows[2] + "\n" + rows[3], "z"]
    assert read("c4") == ["= Title =", *rows[2:]]


def test_a_dataset_that_breaks_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off() -> Iterator[dict[str, str]]:
        yield {"text": "first"}
        raise RuntimeError("shard 2\nis corrupt.")

    hub = FakeHub(monkeypatch, [])
    hub.rows = break_off()  # type: ignore[assignment]
    documents = open_text("org/own").documents()
    assert next(documents) == "first"
    assert sentence(lambda: next(documents)) == "the dataset org/own cannot be read: shard 2 is corrupt"


def test_demo_marks_are_stripped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wiki.utf8").write_text(
        '<doc id="1" title="A > B">\nA > B\n\nFirst.\nSecond.\n\n</doc>\n<doc id="2" title="C">\n\n</doc>\n'
    )
    (tmp_path / "c4.utf8").write_text("One line.\n\nAnother line.\n")
    monkeypatch.setattr(sources, "demo_text_file", lambda part, offline: tmp_path / f"{part}.utf8")
    assert read("demo:wiki") == ["A > B\n\nFirst.\nSecond."]
    assert read("demo:c4") == ["One line.", "Another line."]
    assert read("demo") == read("demo:wiki") + read("demo:c4")
    assert open_text("demo:c4").config == "c4"


@pytest.mark.demo
def test_demo_text() -> None:
    wiki, c4 = read("demo:wiki"), read("demo:c4")
    assert (len(wiki), len(c4)) == (2349, 118)
    assert not any("<doc" in document for document in wiki)
    assert wiki[0].startswith("2007 European Parliament election in Romania\n\nRomania elected")
