"""What `ffnskip eval` does."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnskip.errors import FfnskipError
from ffnskip.fast.fused_forward import FusedForward
from ffnskip.files import replacing
from ffnskip.hub import reason
from ffnskip.stats import SkipStats
from ffnskip_cli import console
from ffnskip_cli.commands import common
from ffnskip_cli.commands.eval import Options
from ffnskip_cli.lm_eval import FfnskipLM, sentence  # before lm_eval itself: says so if it is not installed
from ffnskip_cli.report.tables import Column, print_json, print_sentence, render

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

_log = logging.getLogger("lm_eval")


def run(options: Options) -> None:
    """Evaluate the dense model, then the same model with the profile, and print a row per metric."""
    from lm_eval.models.huggingface import HFLM

    tasks = _Tasks(options)
    pair = common.load_pair(
        options.model, options.profile, options.move, options.model_options, other_weights=options.other_weights
    )
    loaded, profile, _ = pair
    common.say_expected_cost(profile, options.move)
    given = {"pretrained": loaded.model, "tokenizer": loaded.tokenizer, "batch_size": options.batch_size}
    with _quiet():
        dense_model = HFLM(**given)
    console.talk.print("Evaluating the dense model …")
    with FusedForward(loaded.model, None).install():  # as it decodes with the profile, too
        dense = tasks.evaluate(dense_model)
    with _quiet():
        skipping_model = FfnskipLM(**given, profile=profile, other_weights=True)  # that was checked
    console.talk.print("Evaluating the model with the profile …")
    with skipping_model.applied as applied:
        skipping = tasks.evaluate(skipping_model)
        document = _document(options, pair, _rows(dense, skipping), applied.stats)
    if options.output is not None:
        _write(document, options.output)
    _print(document, applied.stats, options)


class _Tasks:
    """The tasks that the options name.

    Raises:
        FfnskipError: there is no such task, or its data cannot be had.
    """

    def __init__(self, options: Options) -> None:
        from lm_eval.tasks import TaskManager

        self._options = options
        with console.busy("Looking for tasks"), redirect_stdout(sys.stderr), _quiet():
            folder = None if options.include_path is None else str(options.include_path)
            self._manager = TaskManager(include_path=folder)
            self._names: list[str] = []
            for name in options.task_names:
                if not (matches := self._manager.match_tasks([name])):
                    raise FfnskipError(f"lm-eval has no task {name}: `lm_eval ls tasks` lists them.")
                self._names += matches
            try:
                self._manager.load(self._names)  # before the model is
            except Exception as error:  # tasks run code of their own, and their data come from anywhere
                raise FfnskipError(f"The tasks {', '.join(self._names)} cannot be loaded: {reason(error)}.") from error

    def evaluate(self, model: HFLM) -> dict[str, dict[str, Any]]:
        """Of each task and group, lm-eval's figures by their names."""
        from lm_eval import simple_evaluate

        options = self._options
        with redirect_stdout(sys.stderr):
            results = simple_evaluate(
                model=model,
                tasks=self._names,
                num_fewshot=options.num_fewshot,
                batch_size=options.batch_size,
                limit=options.limit,
                log_samples=False,
                task_manager=self._manager,
            )
        figures: dict[str, dict[str, Any]] = results["results"]
        return figures


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what lm-eval warns of by the way: models that are loaded already, metrics without settings."""
    level = _log.level
    _log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _log.setLevel(level)


def _rows(dense: dict[str, dict[str, Any]], skipping: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per task, metric and filter; standard errors are None where lm-eval has none."""
    rows = []
    for task, figures in dense.items():
        for name, value in figures.items():
            metric, _, filter = name.partition(",")
            if not filter or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error, other = f"{metric}_stderr,{filter}", skipping[task][name]
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": filter,
                    "dense": value,
                    "dense_stderr": _number(figures.get(error)),
                    "ffnskip": other,
                    "ffnskip_stderr": _number(skipping[task].get(error)),
                    "difference": other - value,
                }
            )
    return rows


def _number(value: object) -> float | None:
    return value if isinstance(value, float) else None  # lm-eval says N/A where it has none


def _document(options: Options, pair: common.Pair, rows: list[dict[str, Any]], stats: SkipStats) -> dict[str, Any]:
    loaded, profile, profile_name = pair
    return {
        "schema": "ffnskip-eval/v1",
        "model": loaded.id,
        "profile": profile_name,
        "threshold": profile.skip.threshold,
        "device": loaded.placement,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "lm_eval": version("lm_eval"),
        "tasks": options.task_names,
        "num_fewshot": options.num_fewshot,
        "limit": options.limit,
        "batch_size": options.batch_size,
        "skip_ratio": stats.skip_ratio,
        "never_skip_fraction": stats.never_skip_fraction,
        "tokens_past_warm_up": stats.tokens,
        "warm_up_tokens": stats.warm_up_tokens,
        "rows": rows,
    }


def _write(document: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n")
    console.talk.print(f"Wrote {path}.", markup=False)


def _print(document: dict[str, Any], stats: SkipStats, options: Options) -> None:
    if options.format == "json":
        print_json(document)
        return
    columns = [
        Column("task", "task"),
        Column("metric", "metric"),
        Column("filter", "filter"),
        Column("dense", "dense", ".4f"),
        Column("dense_stderr", "±", ".4f"),
        Column("ffnskip", "ffnskip", ".4f"),
        Column("ffnskip_stderr", "±", ".4f"),
        Column("difference", "difference", "+.4f"),
    ]
    render(document["rows"], columns, options.format)
    if options.format != "csv":
        print_sentence(f"{sentence(stats)}.", options.format)
