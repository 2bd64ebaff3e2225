"""The documents of the paper's tasks, from the network or a local copy, and how their answers are scored.

The functions without an underscore are named in the task files of `tasks/`, which lm-eval reads.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict, load_dataset

from ffnskip.errors import FfnskipError

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

Document = dict[str, Any]
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}

# The dataset of the Hub is a script, which the library `datasets` runs no more: this is the file that it reads.
_FREEBASEQA = "https://raw.githubusercontent.com/kelvin-jiang/FreebaseQA/master/FreebaseQA-eval.json"
_CNN_DAILYMAIL = ("abisee/cnn_dailymail", "3.0.0")
_MT_BENCH = "HuggingFaceH4/mt_bench_prompts"
# The bounds in words between small, medium and large stories are those of LLM-KICK (Jaiswal et al., ICLR 2024), the
# evaluation that the paper follows.
_MOST_SMALL, _MOST_MEDIUM = 470, 790


def freebaseqa(file: str | None = None, **_: Any) -> DatasetDict:
    """The questions and accepted answers of FreebaseQA's eval split (Jiang, Wu and Jiang, NAACL 2019)."""
    if file is not None and Path(file).suffix == ".txt":
        return _as_test(_question_and_answer(line, file) for line in _lines(file))
    if file is None or Path(file).suffix == ".json":
        rows = load_dataset("json", data_files={"test": file or _FREEBASEQA}, field="Questions", split="test")
        return _as_test({"question": row["RawQuestion"], "answers": _answers_of(row["Parses"])} for row in rows)
    return _as_test(_only(row, file, question=str, answers=list) for row in _rows(file))


def cnn_dailymail(file: str | None = None, **_: Any) -> DatasetDict:
    """The articles and highlights of CNN/DailyMail's test split (Hermann et al. 2015; See et al. 2017)."""
    if file is None:
        return DatasetDict(test=load_dataset(*_CNN_DAILYMAIL, split="test"))
    return _as_test(_only(row, file, article=str, highlights=str) for row in _rows(file))


def mt_bench(file: str | None = None) -> list[Document]:
    """The two-turn questions of MT-Bench (Zheng et al., NeurIPS 2023): `turns`, `category` and perhaps `reference`."""
    rows = load_dataset(_MT_BENCH, split="train") if file is None else _rows(file)
    documents = []
    for row in rows:
        turns = row.get("turns") or row.get("prompt")
        if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, str) for turn in turns):
            raise FfnskipError(f"{file or _MT_BENCH} is not MT-Bench: a question has no list of two `turns`.")
        documents.append(
            {"turns": turns, "category": row.get("category") or "", "reference": row.get("reference") or []}
        )
    return documents


def small_stories(stories: Dataset) -> Dataset:
    """Those of at most 470 words."""
    return _stories(stories, "small", lambda words: words <= _MOST_SMALL)


def medium_stories(stories: Dataset) -> Dataset:
    """Those of more words, and at most 790."""
    return _stories(stories, "medium", lambda words: _MOST_SMALL < words <= _MOST_MEDIUM)


def large_stories(stories: Dataset) -> Dataset:
    """Those of more than 790 words."""
    return _stories(stories, "large", lambda words: words > _MOST_MEDIUM)


def score_factoid(document: Document, results: list[str]) -> dict[str, float]:
    """Whether the short answer is an accepted one, and whether an accepted one stands anywhere in the text.

    The short answer is the first line that says something, whole or up to its first full stop, comma or the like.
    Case, punctuation, articles and spaces do not count.
    """
    line = results[0].strip(" :\n").partition("\n")[0]
    said = {_normal(line), _normal(re.split(r"[.,;:!?](?:\s|$)", line, maxsplit=1)[0])}
    accepted = {_normal(answer) for answer in document["answers"]} - {""}
    text = f" {_normal(results[0])} "
    return {
        "exact_match": float(not said.isdisjoint(accepted)),
        "contains": float(any(f" {answer} " in text for answer in accepted)),
    }


def score_summary(document: Document, results: list[str]) -> dict[str, float]:
    """F-measures of ROUGE-1, -2 and -L (Lin 2004), with stemming, against the highlights."""
    scores = scorer().score(document["highlights"], results[0])
    return {name: score.fmeasure for name, score in scores.items()}


@cache
def scorer() -> RougeScorer:
    """What computes ROUGE; raises FfnskipError where it is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise FfnskipError("ROUGE needs rouge-score: pip install 'ffnskip[eval]'.") from error
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def _normal(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (Rajpurkar et al. 2016)."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _stories(stories: Dataset, name: str, fits: Callable[[int], bool]) -> Dataset:
    found = stories.filter(lambda story: fits(len(story["article"].split())))
    if not len(found):
        raise FfnskipError(f"The data have no {name} stories: leave cnn_dailymail_{name} out of --tasks.")
    return found


def _as_test(rows: Iterable[Document]) -> DatasetDict:
    return DatasetDict(test=Dataset.from_list(list(rows)))


def _answers_of(parses: list[Document]) -> list[str]:
    found = {name: None for parse in parses for answer in parse["Answers"] for name in answer["AnswersName"]}
    return list(found)


def _question_and_answer(line: str, file: str) -> Document:
    question, bar, answer = line.rpartition("|")
    if not bar:
        raise FfnskipError(f"{file} has a line that is not `question | answer`: {line[:60]!r}.")
    return {"question": question.strip(), "answers": [answer.strip()]}


def _only(row: Document, file: str, **kinds: type) -> Document:
    for name, kind in kinds.items():
        if not isinstance(row.get(name), kind):
            raise FfnskipError(f"{file} has a row without a `{name}` that is a {_KINDS[kind]}.")
    return {name: row[name] for name in kinds}


_KINDS: dict[type, str] = {str: "text", list: "list"}


def _lines(file: str) -> list[str]:
    return [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]


def _rows(file: str) -> Iterable[Document]:
    """The rows of a local file, which may hold fields of any kind besides those that are wanted."""
    suffix = Path(file).suffix
    if suffix == ".jsonl":
        return _json_lines(file)
    if suffix not in (".parquet", ".csv"):
        raise FfnskipError(f"{file} cannot be read: name a .jsonl, .parquet or .csv file.")
    rows: Iterable[Document] = load_dataset(FORMATS[suffix], split="train", data_files=[file])
    return rows


def _json_lines(file: str) -> list[Document]:
    rows = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise FfnskipError(f"{file} has no JSON in line {number}.") from error
            if not isinstance(row, dict):
                raise FfnskipError(f"{file} has no JSON object in line {number}.")
            rows.append(row)
    return rows
