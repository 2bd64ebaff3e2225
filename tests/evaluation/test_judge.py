"""A judge's verdicts, both ways round, and all the ways in which a judge fails."""

from pathlib import Path

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("openai")

from support.judge_server import JudgeServer, completion, judge_server

from ffnskip_cli.evaluation.figures import Pair
from ffnskip_cli.evaluation.judge import Contest, Judge, contests, verdict
from ffnskip_cli.progress import Journal, silently

BETTER = [Contest("mt_bench", f"request {n}", "poor", "good") for n in range(3)]


def judge(server: JudgeServer, journal: Journal | None = None, timeout: float = 10.0) -> Judge:
    return Judge(server.url, "judge", timeout, journal or Journal())


def prefers(word: str, question: str) -> tuple[int, str]:
    a = question.partition("The answer of A:")[2].partition("The answer of B:")[0]
    return completion(f"Because I say so. [[{'A' if word in a else 'B'}]]")


def test_a_better_answer_wins_wherever_it_stands() -> None:
    with judge_server(lambda question: prefers("good", question)) as server:
        (row,) = judge(server).compare(BETTER, silently)
    assert (row["wins"], row["ties"], row["losses"], row["failed"]) == (3, 0, 0, 0)
    assert row["score"] == 1.0
    assert len(server.asked) == 6
    with judge_server(lambda question: prefers("poor", question)) as server:
        (row,) = judge(server).compare(BETTER, silently)
    assert (row["losses"], row["score"]) == (3, 0.0)


def test_a_judge_that_likes_a_place_makes_ties() -> None:
    with judge_server(lambda question: completion("[[A]]")) as server:
        (row,) = judge(server).compare(BETTER, silently)
    assert (row["ties"], row["score"]) == (3, 0.5)


@pytest.mark.parametrize(
    "reply", ["", "A is better", "[[A]] or [[B]]", "[[D]]", "[A]", None, {"verdict": "A"}], ids=repr
)
def test_a_reply_without_one_verdict_is_none(reply: object) -> None:
    assert not isinstance(verdict(reply), str)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ((500, '{"error": {"message": "key sk-secret"}}'), "HTTP 500"),
        ((401, '{"error": {"message": "key sk-secret"}}'), "HTTP 401"),
        ((200, "this is not JSON"), "no completion"),
        ((200, '{"choices": []}'), "no completion"),
        ((200, "null"), "no completion"),
        (completion("I cannot tell."), "no verdict"),
    ],
    ids=["500", "401", "garbage", "empty", "null", "undecided"],
)
def test_failures_are_counted_and_never_scored(
    answer: tuple[int, str], kind: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with judge_server(lambda question: answer) as server:
        failing = judge(server)
        (row,) = failing.compare(BETTER[:1], silently)
    assert failing.failures == {kind: 2}
    assert (row["wins"], row["ties"], row["losses"], row["failed"]) == (0, 0, 0, 1)
    assert row["score"] is None
    assert set(server.keys) == {"Bearer sk-secret"}
    assert "sk-secret" not in "".join(capfd.readouterr())


def test_a_judge_that_hangs_is_left_after_the_timeout() -> None:
    def hang(question: str) -> tuple[int, str]:
        server.released.wait(30)
        return completion("[[A]]")

    with judge_server(hang) as server:
        failing = judge(server, timeout=0.2)
        failing.compare(BETTER[:1], silently)
        assert failing.failures == {"timeout": 2}


def test_a_judge_that_is_not_there_is_not_asked_for_ever() -> None:
    with judge_server(lambda question: completion("[[A]]")) as server:
        pass
    gone = judge(server)
    (row,) = gone.compare(BETTER * 3, silently)
    assert gone.failures["no connection"] == 6
    assert gone.failures["not asked any more"] == 12
    assert row["failed"] == 9


def test_verdicts_are_kept_and_failures_are_asked_again(tmp_path: Path) -> None:
    path, calls = tmp_path / "verdicts.jsonl", []

    def fail_first(question: str) -> tuple[int, str]:
        calls.append(question)
        return (400, "{}") if len(calls) == 1 else prefers("good", question)

    with judge_server(fail_first) as server:
        (row,) = judge(server, Journal(path, resume=True)).compare(BETTER, silently)
        assert (row["wins"], row["failed"]) == (2, 1)
        assert len(calls) == 6
        (row,) = judge(server, Journal(path, resume=True)).compare(BETTER, silently)
        assert (row["wins"], row["failed"]) == (3, 0)
        assert len(calls) == 7


def test_what_has_right_answers_is_not_judged_and_a_conversation_is_judged_as_a_whole() -> None:
    pairs = [
        Pair("mt_bench", "turn 1", 0, "first?", "one", "d1", "f1"),
        Pair("mt_bench", "turn 2", 0, "second?", "", "d2", "f2"),
        Pair("cnn_dailymail_small", "", 4, "a story", "", "d3", "f3"),
        Pair("gsm8k", "", 0, "1 + 1?", "2", "2", "3"),
    ]
    talk, story = contests(pairs)
    assert talk.request.index("first?") < talk.request.index("one") < talk.request.index("second?")
    assert (talk.dense.index("d1") < talk.dense.index("d2"), talk.ffnskip.count("f")) == (True, 2)
    assert (story.request, story.dense, story.ffnskip) == ("a story", "d3", "f3")
