"""What `ffnskip eval` found: tables, sentences, and a page that has the answers, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ffnskip_cli.evaluation.figures import Pair, in_order
from ffnskip_cli.report import evaluation_plot, html
from ffnskip_cli.report.html import Section
from ffnskip_cli.report.tables import Column, print_json, print_sentence, render

Format = Literal["table", "json", "md", "csv"]
Document = Mapping[str, Any]

_SHOWN = 50  # answers of a task on the page; all of them stand in the files
_LONGEST = 1500  # characters of a prompt there


def _compared(digits: int) -> Iterator[Column]:
    for name, sign in (("dense", ""), ("ffnskip", ""), ("difference", "+")):
        yield Column(name, name, f"{sign}.{digits}f")
        yield Column(f"{name}_stderr", "±", f".{digits}f")


_ROWS = (Column("task", "task"), Column("metric", "metric"), Column("filter", "filter"), *_compared(4))
_WRITING = (Column("task", "task"), Column("part", "part"), Column("metric", "metric"), *_compared(3))
_AGREEMENT = (
    Column("task", "task"),
    Column("part", "part"),
    Column("texts", "texts", "d"),
    Column("rouge_l", "ROUGE-L", ".3f"),
    Column("rouge_l_stderr", "±", ".3f"),
    Column("token_agreement", "same tokens", ".3f"),
    Column("token_agreement_stderr", "±", ".3f"),
    Column("same", "same texts", ".3f"),
    Column("same_stderr", "±", ".3f"),
)
_JUDGE = (
    Column("task", "task"),
    Column("wins", "ffnskip wins", "d"),
    Column("ties", "ties", "d"),
    Column("losses", "dense wins", "d"),
    Column("failed", "not judged", "d"),
    Column("score", "score", ".3f"),
    Column("score_stderr", "±", ".3f"),
)


def print_evaluation(document: Document, format: Format) -> None:
    """Print all tables and sentences; of CSV only rows that have the same columns."""
    if format == "json":
        print_json(document)
        return
    if format == "csv":
        compared = [*document["rows"], *document["writing"]]
        render(compared, (*_ROWS[:2], Column("part", "part"), *_ROWS[2:]), format)
        return
    for section in _sections(document):
        render(section.rows, section.columns, format, section.title if section.title != "tasks" else "")
    for sentence in _sentences(document):
        print_sentence(sentence, format)


def page(document: Document, pairs: Sequence[Pair]) -> str:
    """The page: sentences, tables, pictures, and the answers side by side."""
    title = f"{document['model']} with a skip profile: {', '.join(document['tasks'])}"
    parts = [html.items([*_sentences(document), *_settings(document)])]
    parts += [html.table(html.compact(section)) for section in _sections(document)]
    parts += evaluation_plot.pictures(document)
    return html.document(title, [*parts, *_side_by_side(document, pairs)])


def _sections(document: Document) -> Iterator[Section]:
    """The tables that are not empty, in reading order."""
    tables = [
        Section("tasks", document["rows"], _ROWS),
        Section("agreement with the dense model", document["agreement"], _AGREEMENT),
        Section("the texts themselves", document["writing"], _WRITING),
    ]
    if document["judge"] is not None:
        tables.append(Section(f"judged by {document['judge']['model']}", document["judge"]["rows"], _JUDGE))
    yield from (table for table in tables if table.rows)


def _sentences(document: Document) -> Iterator[str]:
    yield (
        f"skip_ratio {document['skip_ratio']:.3f}, never_skip_fraction {document['never_skip_fraction']:.3f} over "
        f"{document['tokens_past_warm_up']} tokens past warm-up; {document['warm_up_tokens']} were within it."
    )
    yield "± is one standard error; that of a difference is of the pairs, as both answered the same questions."
    judge = document["judge"]
    if judge is not None and judge["failures"]:
        kinds = ", ".join(f"{kind} {count}" for kind, count in judge["failures"].items())
        yield f"The judge failed, and what it failed on is scored for nobody: {kinds}."


def _settings(document: Document) -> Iterator[str]:
    yield f"Profile {document['profile']} in {document['dtype']} on {document['device']}."
    given = {
        "at most {} examples of each task": document["limit"],
        "answers of at most {} tokens": document["max_new_tokens"],
        "{} examples in the prompt": document["num_fewshot"],
    }
    settings = [sentence.format(value) for sentence, value in given.items() if value is not None]
    if settings:
        yield f"Asked for: {', '.join(settings)}."


def _side_by_side(document: Document, pairs: Sequence[Pair]) -> Iterator[str]:
    counts = Counter(pair.task for pair in pairs)
    files = " and ".join(Path(path).name for path in document["answers"].values())
    shown: dict[str, list[Pair]] = {}
    for pair in in_order(list(pairs), _SHOWN):
        shown.setdefault(pair.task, []).append(pair)
    for task, group in shown.items():
        yield html.heading(f"Answers: {task}")
        yield html.items([f"{len(group)} of {counts[task]}, those that differ first; all are in {files}."])
        for place, pair in enumerate(group):
            yield _one(pair, opened=place == 0)


def _one(pair: Pair, *, opened: bool) -> str:
    same = "the same" if pair.dense == pair.ffnskip else "different"
    summary = ", ".join(part for part in (f"Example {pair.number + 1}", pair.part, same) if part)
    prompt = pair.prompt if len(pair.prompt) <= _LONGEST else f"… {pair.prompt[-_LONGEST:]}"
    texts = {"dense": pair.dense, "ffnskip": pair.ffnskip}
    if pair.expected:
        texts["expected"] = pair.expected
    return html.side_by_side(summary, prompt, texts, opened=opened)
