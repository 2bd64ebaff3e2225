"""The documents of the paper's tasks, from files of several kinds, and how answers to them are scored."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from ffnskip.errors import FfnskipError
from ffnskip_cli.evaluation import documents


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def test_freebaseqa_is_read_from_lines_from_json_lines_and_from_its_own_file(tmp_path: Path) -> None:
    lines = tmp_path / "qa.txt"
    lines.write_text("What | or who wrote it? | jane austen \n\nAnd this? | nobody\n")
    (first, second) = documents.freebaseqa(str(lines))["test"]
    assert first == {"question": "What | or who wrote it?", "answers": ["jane austen"]}
    assert second["answers"] == ["nobody"]
    file = write(tmp_path / "qa.jsonl", [{"question": "Who?", "answers": ["a", "b"], "more": 1}])
    assert list(documents.freebaseqa(file)["test"]) == [{"question": "Who?", "answers": ["a", "b"]}]
    parses = [{"Answers": [{"AnswersMid": "m.1", "AnswersName": ["a", "b"]}]}, {"Answers": [{"AnswersName": ["a"]}]}]
    own = {"Dataset": "FreebaseQA-eval", "Questions": [{"RawQuestion": "Who?", "Parses": parses}]}
    file = write(tmp_path / "qa.json", [own])
    assert list(documents.freebaseqa(file)["test"]) == [{"question": "Who?", "answers": ["a", "b"]}]


@pytest.mark.parametrize(
    ("text", "exact", "contains"),
    [
        (" Jane Austen.", 1.0, 1.0),
        (":\n\nThe Jane Austen\nand more", 1.0, 1.0),
        (" jane austen, who was born in 1775", 1.0, 1.0),
        (" It was Jane Austen.", 0.0, 1.0),
        (" Jane Austenite", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_a_factoid_answer_is_exact_after_normalisation(text: str, exact: float, contains: float) -> None:
    document = {"question": "Who?", "answers": ["jane austen", "..."]}
    assert documents.score_factoid(document, [text]) == {"exact_match": exact, "contains": contains}


def test_summaries_are_scored_by_rouge_and_stories_sorted_by_their_words(tmp_path: Path) -> None:
    scores = documents.score_summary({"highlights": "a cat sat on the mat"}, ["a cat sat on mats"])
    assert set(scores) == {"rouge1", "rouge2", "rougeL"}
    assert scores["rouge1"] == pytest.approx(10 / 11)  # mats is stemmed
    stories = [{"article": "word " * n, "highlights": "it"} for n in (470, 471, 790, 791)]
    read = documents.cnn_dailymail(write(tmp_path / "cnn.jsonl", stories))["test"]
    sorts = (documents.small_stories, documents.medium_stories, documents.large_stories)
    lengths = [[len(story["article"].split()) for story in sort(read)] for sort in sorts]
    assert lengths == [[470], [471, 790], [791]]
    with pytest.raises(FfnskipError, match="no large stories"):
        documents.large_stories(documents.small_stories(read))


def test_mt_bench_has_two_turns_under_either_name(tmp_path: Path) -> None:
    rows = [{"turns": ["a", "b"], "category": "math", "reference": ["1", "2"]}, {"prompt": ["c", "d"]}]
    one, other = documents.mt_bench(write(tmp_path / "mt.jsonl", rows))
    assert one == {"turns": ["a", "b"], "category": "math", "reference": ["1", "2"]}
    assert other == {"turns": ["c", "d"], "category": "", "reference": []}


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("mt.jsonl", '{"turns": ["a"]}', "two `turns`"),
        ("mt.jsonl", "{", "line 1"),
        ("mt.jsonl", "[1]", "line 1"),
        ("mt.doc", "", ".jsonl"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_a_sentence(tmp_path: Path, name: str, content: str, what: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FfnskipError, match=what):
        documents.mt_bench(str(tmp_path / name))


def test_lines_without_an_answer_and_rows_without_a_field_are_refused(tmp_path: Path) -> None:
    (tmp_path / "qa.txt").write_text("no answer\n")
    with pytest.raises(FfnskipError, match=re.escape("question | answer")):
        documents.freebaseqa(str(tmp_path / "qa.txt"))
    with pytest.raises(FfnskipError, match="`answers`"):
        documents.freebaseqa(write(tmp_path / "qa.jsonl", [{"question": "a", "answers": "b"}]))
