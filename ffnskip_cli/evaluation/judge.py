"""A judge of two answers: any model behind an OpenAI-compatible endpoint.

It sees each pair twice, the places swapped, and an answer wins only if it wins in both (Zheng et al., NeurIPS 2023). A
reply that is no verdict, an error of the server, and a timeout are failures: they are counted and score nothing.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from ffnskip.errors import FfnskipError
from ffnskip_cli.evaluation import errors
from ffnskip_cli.evaluation.figures import Pair
from ffnskip_cli.progress import Journal, Track

if TYPE_CHECKING:
    from openai import OpenAI

KEY = "OPENAI_API_KEY"
Verdict = Literal["A", "B", "tie"]
_VERDICTS: dict[str, Verdict] = {"A": "A", "B": "B", "C": "tie"}
_SWAPPED: dict[Verdict, Verdict] = {"A": "B", "B": "A", "tie": "tie"}
_MOST_IN_A_ROW = 6  # failures, after which nothing is asked any more
_JUDGED = ("mt_bench", "cnn_dailymail")  # by which the names of the tasks begin that no rule can score
_INSTRUCTION = (
    "Two assistants, A and B, have answered the same request. Judge which answer serves the user better: correct, "
    "helpful, relevant, complete, well written. Neither the order nor the length of the answers may sway you. Give "
    "your reasons in a few sentences, and end with exactly one of [[A]], [[B]] and, for a tie, [[C]]."
)


@dataclass(frozen=True)
class Contest:
    """One thing that a judge decides: a task's request, which may be of two turns, and two answers to it."""

    task: str
    request: str
    dense: str
    ffnskip: str


@dataclass
class Judge:
    """See the module.

    Attributes:
        url: of the endpoint, such as http://localhost:8000/v1.
        model: its name there.
        timeout: seconds for a reply.
        journal: keeps verdicts, so that none is paid for twice.
        failures: how many there were, by their kind.
    """

    url: str
    model: str
    timeout: float
    journal: Journal
    failures: Counter[str] = field(default_factory=Counter)
    _in_a_row: int = 0

    def compare(self, contests: Sequence[Contest], track: Track) -> list[dict[str, Any]]:
        """A row per task: how often the profile's answers won, tied and lost, and how often the judge failed.

        `score` is the share of wins and half the ties, among the contests that were judged both ways.
        """
        decided: dict[str, list[float | None]] = {}
        for contest in track(contests, f"Asking {self.model}", len(contests)):
            decided.setdefault(contest.task, []).append(self._decide(contest))
        return [_row(task, outcomes) for task, outcomes in decided.items()]

    def _decide(self, contest: Contest) -> float | None:
        """1 if the profile's answer won, 0.5 for a tie, 0 if the dense one won; None after a failure."""
        one = self._ask(contest.request, contest.dense, contest.ffnskip)
        other = self._ask(contest.request, contest.ffnskip, contest.dense)
        if one is None or other is None:
            return None
        if one != _SWAPPED[other]:
            return 0.5  # the place decided
        return {"A": 0.0, "B": 1.0, "tie": 0.5}[one]

    def _ask(self, request: str, a: str, b: str) -> Verdict | None:
        texts = [f"The request:\n{request}", f"The answer of A:\n{a}", f"The answer of B:\n{b}"]
        question = "\n\n----\n\n".join(texts)
        key = [self.url, self.model, _INSTRUCTION, question]
        kept: Verdict | None = self.journal.kept(key)
        if kept is not None:
            return kept
        if self._in_a_row >= _MOST_IN_A_ROW:
            self.failures["not asked any more"] += 1
            return None
        found = self._reply(question)
        if isinstance(found, _Failure):
            self.failures[found.kind] += 1
            self._in_a_row += 1
            return None
        self._in_a_row = 0
        self.journal.keep(key, found)
        return found

    def _reply(self, question: str) -> Verdict | _Failure:
        import openai

        messages: Any = [{"role": "system", "content": _INSTRUCTION}, {"role": "user", "content": question}]
        try:
            completion = self._client.chat.completions.create(model=self.model, messages=messages, temperature=0)
            return verdict(completion.choices[0].message.content)
        except openai.APITimeoutError:
            return _Failure("timeout")
        except openai.APIStatusError as error:  # what it says may repeat the key
            return _Failure(f"HTTP {error.status_code}")
        except openai.APIConnectionError:
            return _Failure("no connection")
        except Exception:  # a reply that is not even JSON, or lacks what the protocol promises
            return _Failure("no completion")

    @cached_property
    def _client(self) -> OpenAI:
        try:
            from openai import OpenAI
        except ModuleNotFoundError as error:
            raise FfnskipError("A judge needs the library openai: pip install 'ffnskip[eval]'.") from error
        key = os.environ.get(KEY) or "none"  # a local server wants none
        return OpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=1)


@dataclass(frozen=True)
class _Failure:
    kind: str


def verdict(reply: object) -> Verdict | _Failure:
    """What a reply decides; a failure if it has no verdict or several different ones."""
    found = set(re.findall(r"\[\[([ABC])\]\]", reply)) if isinstance(reply, str) else set()
    return _VERDICTS[found.pop()] if len(found) == 1 else _Failure("no verdict")


def is_judged(task: str) -> bool:
    """Whether a task is one for a judge; all others have right answers."""
    return task.startswith(_JUDGED)


def contests(pairs: Sequence[Pair]) -> list[Contest]:
    """What there is to judge: each conversation of MT-Bench as a whole, and each summary."""
    talks: dict[tuple[str, int], list[Pair]] = {}
    for pair in pairs:
        if pair.written and is_judged(pair.task):
            talks.setdefault((pair.task, pair.number), []).append(pair)
    return [
        Contest(task, _joined(talk, "prompt"), _joined(talk, "dense"), _joined(talk, "ffnskip"))
        for (task, _), talk in talks.items()
    ]


def _joined(talk: Sequence[Pair], side: str) -> str:
    """One side of a conversation, with the reference answers that there are."""
    texts = []
    for pair in talk:
        text = getattr(pair, side)
        if side == "prompt" and pair.expected:
            text += f"\n(A reference answer: {pair.expected})"
        texts.append(f"({pair.part}) {text}" if pair.part else text)
    return "\n\n".join(texts)


def _row(task: str, outcomes: Sequence[float | None]) -> dict[str, Any]:
    judged = [outcome for outcome in outcomes if outcome is not None]
    counts = {name: judged.count(value) for name, value in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0))}
    failed = len(outcomes) - len(judged)
    score = errors.mean(judged) if judged else None
    figures = {"score": score and score.value, "score_stderr": score and score.stderr}
    return {"task": task, **counts, "failed": failed, **figures}
