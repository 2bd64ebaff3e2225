"""MT-Bench: conversations of two turns, of which the second builds on the model's own first answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ffnskip.errors import FfnskipError
from ffnskip_cli.evaluation.documents import Document
from ffnskip_cli.evaluation.figures import Pair

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

TASK = "mt_bench"
_MOST_TOKENS = 1024  # of an answer, as in FastChat, where the benchmark comes from


def hold(model: HFLM, questions: Sequence[Document], most_tokens: int | None = None) -> list[tuple[str, str]]:
    """The model's greedy answers to both turns of each question, in its own chat format.

    Args:
        model: lm-eval's; it is asked like for any task, the first turns of all questions before the second.
        questions: of `documents.mt_bench`.
        most_tokens: the longest answer.

    Raises:
        FfnskipError: the model has no chat template.
    """
    if model.tokenizer.chat_template is None:
        raise FfnskipError(f"The model has no chat template, which {TASK} needs: choose a model that was made to chat.")
    talks = [[_said("user", question["turns"][0])] for question in questions]
    first = _answers(model, talks, most_tokens)
    for talk, question, answer in zip(talks, questions, first, strict=True):
        talk += [_said("assistant", answer), _said("user", question["turns"][1])]
    return list(zip(first, _answers(model, talks, most_tokens), strict=True))


def pairs(
    questions: Sequence[Document], dense: Sequence[tuple[str, str]], skipping: Sequence[tuple[str, str]]
) -> list[Pair]:
    """Both models' answers, turn by turn."""
    return [
        Pair(TASK, f"turn {turn + 1}", number, question["turns"][turn], _reference(question, turn), a[turn], b[turn])
        for number, (question, a, b) in enumerate(zip(questions, dense, skipping, strict=True))
        for turn in range(2)
    ]


def _reference(question: Document, turn: int) -> str:
    references = question["reference"]
    return str(references[turn]) if turn < len(references) else ""


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _answers(model: HFLM, talks: Sequence[list[dict[str, str]]], most_tokens: int | None) -> list[str]:
    from lm_eval.api.instance import Instance

    settings: dict[str, Any] = {"until": [], "max_gen_toks": most_tokens or _MOST_TOKENS, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (model.apply_chat_template(talk), settings), number)
        for number, talk in enumerate(talks)
    ]
    answers: list[str] = model.generate_until(requests)
    return [answer.strip() for answer in answers]
