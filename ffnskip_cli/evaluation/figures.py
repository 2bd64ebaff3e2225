"""The rows of tables, and the pairs of answers, that come of evaluating the same tasks twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ffnskip_cli.evaluation.errors import Paired, paired, weighted
from ffnskip_cli.evaluation.lm_tasks import LmTasks, Results

_Samples = dict[tuple[str, str], dict[int, Any]]  # by metric and filter, the value of each document


@dataclass(frozen=True)
class Pair:
    """What both models answered to one question.

    Attributes:
        task: its name.
        part: of the task, such as `turn 1`, or nothing.
        number: of the document.
        prompt: what was asked.
        expected: the right answer, if there is one.
        dense, ffnskip: the answers.
        written: whether they are text that the model wrote, and not a choice.
    """

    task: str
    part: str
    number: int
    prompt: str
    expected: str
    dense: str
    ffnskip: str
    written: bool = True


def rows(tasks: LmTasks, dense: Results, skipping: Results) -> list[dict[str, Any]]:
    """A row per task or group, metric and filter, with the errors of both figures and of their difference."""
    found = {name: _task(tasks, name, dense["samples"][name], skipping["samples"][name]) for name in tasks.tasks}
    sizes = {name: counts["effective"] for name, counts in dense["n-samples"].items()}
    made = []
    for name, figures in dense["results"].items():
        for key, value in figures.items():
            metric, _, filter = key.partition(",")
            if not filter or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if name in found:
                figure = found[name][metric, filter]
            else:
                weights = tasks.weights(name, metric, sizes)
                figure = weighted({part: found[part][metric, filter] for part in weights}, weights)
            made.append(figure.row(task=name, metric=metric, filter=filter))
    return made


def pairs(dense: Results, skipping: Results) -> list[Pair]:
    """What both models answered, document by document; log-likelihoods of whole texts are no answers."""
    made = []
    for task, samples in dense["samples"].items():
        answered = {sample["doc_id"]: sample for sample in skipping["samples"][task]}
        first = samples[0]["filter"]  # others are of the same answers
        for sample in samples:
            other = answered[sample["doc_id"]]
            answer = _answer(sample)
            if sample["filter"] == first and answer is not None:
                prompt, written = sample["arguments"][0][0], _is_text(sample)
                target, both = str(sample["target"]), (answer, _answer(other) or "")
                made.append(Pair(task, "", sample["doc_id"], str(prompt), target if written else "", *both, written))
    return made


def _task(tasks: LmTasks, name: str, dense: Any, skipping: Any) -> dict[tuple[str, str], Paired]:
    one, other = _values(dense), _values(skipping)
    return {
        key: paired(list(values.values()), [other[key][number] for number in values], tasks.aggregation(name, key[0]))
        for key, values in one.items()
    }


def _values(samples: list[dict[str, Any]]) -> _Samples:
    values: _Samples = {}
    for sample in samples:
        for metric in sample["metrics"]:
            values.setdefault((metric, sample["filter"]), {})[sample["doc_id"]] = sample[metric]
    return values


def _is_text(sample: Mapping[str, Any]) -> bool:
    return isinstance(sample["resps"][0][0], str)


def _answer(sample: Mapping[str, Any]) -> str | None:
    """What the model wrote, or the choice that it finds likeliest; None for a text that it only scored."""
    if _is_text(sample):
        return str(sample["resps"][0][0])
    if any(len(asked) < 2 for asked in sample["arguments"]):
        return None
    choices = [asked[1] for asked in sample["arguments"]]
    scores = [float(responses[0][0]) for responses in sample["resps"]]
    return str(choices[scores.index(max(scores))]).strip()


def in_order(pairs: list[Pair], of_each: int) -> Iterator[Pair]:
    """Of each task the first few pairs, those whose answers differ before the others."""
    counts: dict[str, int] = {}
    for pair in sorted(pairs, key=lambda pair: (pair.dense == pair.ffnskip, pair.number, pair.part)):
        counts[pair.task] = counts.get(pair.task, 0) + 1
        if counts[pair.task] <= of_each:
            yield pair
