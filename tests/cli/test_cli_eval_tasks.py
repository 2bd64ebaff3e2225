"""`ffnskip eval` on the paper's tasks, from local copies of their data."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.cli import mistake, run, succeed

pytest.importorskip("lm_eval")
pytest.importorskip("openai")

from lm_eval.tasks import manager
from support.judge_server import completion, judge_server
from transformers import AutoTokenizer

from ffnskip_cli.evaluation.answers import Answers

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    (tmp_path / "qa.txt").write_text("a b? | c\nd e? | f\ng h? | i\n")
    return tmp_path / "qa.txt"


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    rows = [{"turns": [f"say {n}", "again"], "category": "writing"} for n in range(3)]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "talks.jsonl"


@pytest.fixture
def few_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the thousands of tasks that lm-eval brings, only gsm8k and mmlu: it looks through all, for ten seconds."""
    folder = tmp_path_factory.mktemp("lm_eval")
    for name in ("gsm8k", "mmlu/default"):
        shutil.copytree(Path(manager.__file__).parent / name, folder / name)
    monkeypatch.setattr(manager, "__file__", str(folder / "manager.py"))


@pytest.fixture
def eval_command(plateau_folder: Path, plateau_profiles: Path) -> tuple[object, ...]:
    return ("eval", plateau_folder, "--profile", plateau_profiles / "0.30.yaml", "--max-new-tokens", 12)


@pytest.fixture
def chatty(plateau_folder: Path, eval_command: tuple[object, ...], tmp_path: Path) -> tuple[object, ...]:
    """The same on a model with a chat template."""
    folder = tmp_path / "chatty"
    folder.mkdir()
    for file in plateau_folder.iterdir():
        (folder / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(plateau_folder)
    tokenizer.chat_template = CHAT
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return (eval_command[0], folder, *eval_command[2:])


def test_differences_have_errors_and_a_killed_eval_goes_on(
    eval_command: tuple[object, ...], questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*eval_command, "--tasks", "freebaseqa", "--data", questions, "--format", "json")
    whole = json.loads(succeed(*command, "-o", tmp_path / "whole.json").stdout)
    own, written = Answers.add_partial, []

    def die_at_the_fifth(self: Answers, kind: str, asked: Any, answer: Any) -> None:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(answer)
        own(self, kind, asked, answer)

    monkeypatch.setattr(Answers, "add_partial", die_at_the_fifth)
    assert run(*command, "-o", tmp_path / "out.json").exit_code != 0
    monkeypatch.setattr(Answers, "add_partial", own)
    result = succeed(*command, "-o", tmp_path / "out.json")
    assert "3 of its answers had been given before" in result.stderr
    assert "1 of its answers had been given before" in result.stderr
    assert str(tmp_path / "out.json.answers") in result.stderr
    document = json.loads(result.stdout)
    for name in ("rows", "writing", "agreement", "skip_ratio", "tokens_past_warm_up", "warm_up_tokens"):
        assert document[name] == whole[name]
    assert {row["metric"] for row in document["rows"]} == {"exact_match", "contains"}
    assert all(row["difference_stderr"] is not None for row in document["rows"])
    lengths = [row for row in document["writing"] if row["metric"] == "length in tokens"]
    assert lengths[0]["dense"] > 0


def test_mt_bench_is_judged_and_the_page_has_both_answers(
    chatty: tuple[object, ...], talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    page = tmp_path / "out.html"
    replies = iter([(500, "sk-secret"), completion("[[A]]"), completion("[[B]]"), completion("nothing")])
    with judge_server(lambda question: next(replies, completion("[[A]]"))) as server:
        judge = ("--judge-url", server.url, "--judge-model", "strict", "--judge-timeout", 5)
        command = (*chatty, "--tasks", "mt_bench", "--data", talks, "--limit", 2, "-o", page, *judge)
        result = succeed(*command, "--format", "json")
    document = json.loads(result.stdout)
    (row,) = document["judge"]["rows"]
    assert row["wins"] + row["ties"] + row["losses"] + row["failed"] == 2
    assert {(row["task"], row["part"]) for row in document["agreement"]} == {
        ("mt_bench", "turn 1"),
        ("mt_bench", "turn 2"),
    }
    html = page.read_text()
    assert "Answers: mt_bench" in html
    assert "say 1" in html
    everything = [html, result.stdout, result.stderr, *(p.read_text() for p in tmp_path.rglob("*.jsonl"))]
    assert not any("sk-secret" in text for text in everything)


def test_answers_of_an_eval_that_is_not_written_are_in_the_cache_folder(
    eval_command: tuple[object, ...], questions: Path, own_cache: Path
) -> None:
    command = (*eval_command, "--tasks", "freebaseqa", "--data", f"freebaseqa={questions}")
    succeed(*command, "--limit", 1)
    assert "1 of its answers" in succeed(*command, "--limit", 2).stderr
    assert len(list((own_cache / "answers").glob("*.jsonl"))) == 2


def test_summaries_of_three_lengths_come_from_one_file(eval_command: tuple[object, ...], tmp_path: Path) -> None:
    stories = [{"article": "ab " * n, "highlights": "ab"} for n in (20, 480, 800)]
    (tmp_path / "cnn.jsonl").write_text("\n".join(map(json.dumps, stories)))
    data = ("--tasks", "cnn_dailymail", "--data", tmp_path / "cnn.jsonl")
    rows = json.loads(succeed(*eval_command, *data, "--format", "json").stdout)["rows"]
    lengths = {f"cnn_dailymail_{length}" for length in ("small", "medium", "large")}
    assert {(row["task"], row["metric"]) for row in rows} == {
        (task, rouge) for task in lengths for rouge in ("rouge1", "rouge2", "rougeL")
    }


def test_tasks_of_lm_eval_take_local_copies_too(eval_command: tuple[object, ...], tmp_path: Path) -> None:
    rows = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ("--tasks", "gsm8k", "--data", tmp_path / "sums.jsonl", "--num-fewshot", 1, "--limit", 2)
    found = json.loads(succeed(*eval_command, *data, "--format", "json").stdout)["rows"]
    assert {row["filter"] for row in found} == {"strict-match", "flexible-extract"}


@pytest.mark.usefixtures("few_of_its_own")
def test_mistakes_are_one_sentence(
    eval_command: tuple[object, ...], questions: Path, talks: Path, tmp_path: Path
) -> None:
    def refused(*arguments: object) -> str:
        return mistake(*eval_command, *arguments)

    assert "TASK=FILE" in refused("--tasks", "mt_bench,freebaseqa", "--data", questions)
    assert "no file" in refused("--tasks", "freebaseqa", "--data", tmp_path / "none.txt")
    twice = ("--data", questions, "--data", f"freebaseqa={questions}")
    assert "two files" in refused("--tasks", "freebaseqa", *twice)
    assert "both" in refused("--tasks", "mt_bench", "--data", talks, "--judge-url", "http://localhost")
    judge = ("--judge-url", "http://localhost", "--judge-model", "x")
    assert "mt_bench and cnn_dailymail" in refused("--tasks", "freebaseqa", "--data", questions, *judge)
    assert "group" in refused("--tasks", "mmlu", "--data", talks)
    assert "question | answer" in refused("--tasks", "freebaseqa", "--data", broken(tmp_path))


def broken(folder: Path) -> Path:
    (folder / "broken.txt").write_text("no answer")
    return folder / "broken.txt"


@pytest.mark.usefixtures("few_of_its_own")
@pytest.mark.parametrize("task", ["freebaseqa", "mt_bench", "cnn_dailymail", "gsm8k"])
def test_without_a_network_the_sentence_names_the_option_for_local_copies(
    eval_command: tuple[object, ...], task: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", no_network)
    monkeypatch.setattr("ffnskip_cli.evaluation.documents.load_dataset", no_network)
    sentence = mistake(*eval_command, "--tasks", task)
    assert "--data" in sentence
    assert "no route to host" in sentence
