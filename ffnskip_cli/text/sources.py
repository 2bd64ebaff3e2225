"""Open a text by the name that a user gives: local files, datasets of the Hub, the demo, or the model's own words."""

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ffnskip.errors import FfnskipError, reason
from ffnskip.hub import commit_of, hub_errors
from ffnskip_cli.sources.demo import demo_text_file
from ffnskip_cli.sources.names import looks_like_path, public_name

Documents = Callable[[], Iterator[str]]

_SUFFIXES = (".txt", ".jsonl", ".parquet")
_WIKITEXT = "Salesforce/wikitext"
_SHORT_NAMES = {
    "wikitext": (_WIKITEXT, "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
    "gsm8k": ("openai/gsm8k", "main"),
}
_DOCUMENT_CHARACTERS = 2000


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A named text: `documents()` reads it anew from the start, lazily, as stripped documents that are not blank.

    `dataset` is a Hub id, a keyword or a base name, never a path. `shuffled` says that the documents come in random
    order already, so that nobody needs to read ahead to mix them.
    """

    dataset: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    documents: Documents
    shuffled: bool = False


def open_text(spec: str, *, offline: bool = False, generate: Documents | None = None) -> TextSource:
    """Open the text that `spec` names; nothing but a Hub revision is read before `documents()` is called.

    `spec` is `demo`, `demo:wiki`, `demo:c4`, `self` (the documents of `generate`), a local .txt, .jsonl
    or .parquet file, or `id[:config[:split]]` where id is wikitext, c4, gsm8k or any dataset of the Hugging Face Hub.
    Raises FfnskipError if there is no such text; so does reading the documents if they cannot be read.
    """
    keyword, _, part = spec.partition(":")
    if keyword == "demo":
        return _open_demo(part, offline)
    if spec == "self":
        if generate is None:
            raise FfnskipError("the text `self` is sampled from the model, which is not possible here: name another")
        return TextSource(dataset="self", documents=_stripped(generate), shuffled=True)
    if keyword not in _SHORT_NAMES and (os.path.exists(spec) or looks_like_path(spec, _SUFFIXES)):
        return _open_file(spec)
    return _open_hub(spec, offline or is_offline_mode())


def group_paragraphs(paragraphs: Iterable[str], min_characters: int) -> Iterator[str]:
    """Join paragraphs by line breaks into documents of at least `min_characters`; the last one may be shorter.

    Blank paragraphs are dropped. A paragraph is cut only where it is longer than four documents, at spaces.
    """
    group: list[str] = []
    size = 0
    for paragraph in paragraphs:
        for piece in _pieces(paragraph.strip(), 4 * min_characters):
            group.append(piece)
            size += len(piece)
            if size >= min_characters:
                yield "\n".join(group)
                group, size = [], 0
    if group:
        yield "\n".join(group)


def _pieces(paragraph: str, max_characters: int) -> Iterator[str]:
    start = 0
    while len(paragraph) - start > max_characters:
        space = paragraph.rfind(" ", start + 1, start + max_characters)
        end = space if space > start else start + max_characters
        yield paragraph[start:end]
        start = end
    if start < len(paragraph):
        yield paragraph[start:]


def _stripped(documents: Documents) -> Documents:
    return lambda: (text for document in documents() if (text := document.strip()))


def _open_demo(part: str, offline: bool) -> TextSource:
    def documents() -> Iterator[str]:
        if part in ("", "wiki"):
            yield from _marked_documents(_lines(demo_text_file("wiki", offline)))
        if part in ("", "c4"):
            yield from _lines(demo_text_file("c4", offline))

    if part not in ("", "wiki", "c4"):
        raise FfnskipError(f"the demo text has no part {part!r}: use demo, demo:wiki or demo:c4")
    return TextSource(dataset="demo", config=part or None, documents=_stripped(documents))


def _marked_documents(lines: Iterable[str]) -> Iterator[str]:
    """The documents between `<doc …>` and `</doc>` lines; each starts with its title."""
    document: list[str] = []
    for line in lines:
        if line.startswith("<doc "):
            document = []
        elif line.startswith("</doc>"):
            yield "".join(document)
        else:
            document.append(line)


def _open_file(spec: str) -> TextSource:
    path = Path(spec)
    if not os.path.exists(spec):
        raise FfnskipError(f"no such file: {spec}")
    if not path.is_file() or path.suffix.lower() not in _SUFFIXES:
        raise FfnskipError(f"{spec} cannot be read as text: name a .txt, .jsonl or .parquet file")

    def documents() -> Iterator[str]:
        if path.suffix.lower() == ".txt":
            return group_paragraphs(_lines(path), _DOCUMENT_CHARACTERS)
        return _row_documents(_file_rows(path), path.name)

    return TextSource(dataset=public_name(path), documents=_stripped(documents))


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise FfnskipError(f"{path.name} is not UTF-8 text: convert it first") from error
    except OSError as error:
        raise FfnskipError(f"{path.name} cannot be read: {error.strerror}") from error


def _file_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        if path.suffix.lower() == ".jsonl":
            yield from _json_rows(path)
        else:
            pattern = glob.escape(os.path.abspath(path))
            yield from _streamed("parquet", data_files=pattern, split="train")
    except Exception as error:  # Arrow, JSON and Unicode errors have no base class of their own
        raise FfnskipError(f"{path.name} is no readable {path.suffix} file: {reason(error)}") from error


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:  # Arrow's reader crashes on a line that is `null`
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no object")
                yield row


def _open_hub(spec: str, offline: bool) -> TextSource:
    name, config, split, *more = [*spec.split(":"), "", ""]
    if any(more):
        raise FfnskipError(f"{spec} has too many parts: name a dataset as id, id:config or id:config:split")
    dataset, default_config = _SHORT_NAMES.get(name, (name, ""))
    config, split = config or default_config, split or "train"
    with hub_errors("dataset", dataset, offline):
        validate_repo_id(dataset)
        revision = None if offline else commit_of("dataset", dataset)

    def documents() -> Iterator[str]:
        texts = _row_documents(_hub_rows(dataset, config, split, revision, offline), dataset)
        # Its rows are single lines, mostly: one article is many rows.
        return group_paragraphs(texts, _DOCUMENT_CHARACTERS) if dataset == _WIKITEXT else texts

    return TextSource(
        dataset=dataset, config=config or None, split=split, revision=revision, documents=_stripped(documents)
    )


def _hub_rows(
    dataset: str, config: str, split: str, revision: str | None, offline: bool
) -> Iterator[Mapping[str, Any]]:
    with hub_errors("dataset", dataset, offline):
        yield from _streamed(dataset, config or None, split=split, revision=revision, offline=offline)


def _streamed(*names: str | None, offline: bool | None = None, **what: str | None) -> Iterator[Mapping[str, Any]]:
    """The rows that `datasets.load_dataset` reads, without a word from it."""
    import datasets  # with pandas and Arrow, a second that commands without such a text need not wait

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if offline is not None:
        datasets.config.HF_HUB_OFFLINE = offline  # else it is set at import only, from the environment
    yield from datasets.load_dataset(*names, **what, streaming=True)


def _row_documents(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[str]:
    """The text of each row: its column `text`, or else `question` and `answer`, or else its only column of strings."""
    columns: list[str] = []
    for row in rows:
        columns = columns or _text_columns(row, name)
        values = [value for column in columns if (value := row.get(column)) is not None]
        if not all(isinstance(value, str) for value in values):
            raise FfnskipError(f"column {columns[0]} of {name} holds other things than text: convert it to strings")
        yield "\n".join(values)


def _text_columns(row: Mapping[str, Any], name: str) -> list[str]:
    if "text" in row:
        return ["text"]
    if "question" in row and "answer" in row:
        return ["question", "answer"]
    strings = [column for column, value in row.items() if isinstance(value, str)]
    if len(strings) != 1:
        raise FfnskipError(
            f"{name} has no column `text`, only {', '.join(row) or 'empty rows'}: rename the one that holds the text"
        )
    return strings
