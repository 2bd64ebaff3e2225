"""What `ffnskip eval` does."""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.files import replacing
from ffnskip.general.apply import accelerate
from ffnskip_cli import console
from ffnskip_cli.commands import common
from ffnskip_cli.commands.eval import Options
from ffnskip_cli.commands.identity import check_identity
from ffnskip_cli.report.tables import Column, print_json, render
from ffnskip_cli.sources.models import LoadedModel

try:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from ffnskip_cli.lm_eval import FFNSkipLM
except ModuleNotFoundError as missing:
    raise FfnskipError(f"Evaluation needs {missing.name}: pip install 'ffnskip[eval]'.") from None

_COLUMNS = [
    Column("task", "task"),
    Column("metric", "metric"),
    Column("dense", "dense", ".4f"),
    Column("dense_stderr", "±", ".4f"),
    Column("profile", "profile", ".4f"),
    Column("profile_stderr", "±", ".4f"),
    Column("difference", "difference", "+.4f"),
]


def run(options: Options) -> None:
    """Run the tasks densely, then with the profile; print, and write what lm-eval found."""
    for name in ("lm_eval", "transformers"):  # whose warnings of every run are about what is done on purpose
        logging.getLogger(name).setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if options.include_path is None else str(options.include_path))
    tasks = _known(options.tasks, manager)
    profile = common.load_moved(options.profile, options.move)
    loaded = common.load(options.model, options.model_options, profile.skip.rule)
    check_identity(loaded, profile, other_weights=options.other_weights, offline=options.model_options.offline)
    common.say_expected_cost(profile, options.move)
    ours = {"tokenizer": loaded.tokenizer, "batch_size": options.batch_size}
    with _accelerated(loaded):
        dense = _results(HFLM(loaded.model, **ours), "dense", tasks, manager, options)
    skipping = FFNSkipLM(loaded.model, str(options.profile), other_weights=True, **vars(options.move), **ours)
    with skipping.applied:
        found = _results(skipping, "with the profile", tasks, manager, options)
    if options.output is not None:
        with replacing(options.output) as temporary:
            temporary.write_text(json.dumps({"dense": dense, "profile": found}, default=str))
        console.talk.print(f"Wrote {options.output}.", highlight=False)
    _report(_rows(dense, found), skipping.skipped(), loaded, options)


def _accelerated(loaded: LoadedModel) -> AbstractContextManager[object]:
    """The dense model by the arithmetic that it has with the profile on, so that rounding makes no difference."""
    try:
        return accelerate(loaded.model)
    except UnsupportedModelError:
        return nullcontext()


def _known(names: str, manager: TaskManager) -> list[str]:
    tasks = [name.strip() for name in names.split(",") if name.strip()]
    for name in tasks:
        if not manager.match_tasks([name]):
            raise FfnskipError(
                f"lm-eval knows no task {name}: `lm_eval ls tasks` lists them, --include-path adds some."
            )
    return tasks


def _results(model: Any, name: str, tasks: list[str], manager: TaskManager, options: Options) -> dict[str, Any]:
    console.talk.print(f"Running {', '.join(tasks)} {name} …", highlight=False)
    try:
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.chat,
        )
    except (OSError, ConnectionError) as error:
        raise FfnskipError(f"The data of {', '.join(tasks)} cannot be had: {error}") from error
    return results


def _rows(dense: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each figure of each task that both runs have."""
    rows = []
    for task, figures in dense["results"].items():
        others = found["results"][task]
        for key, value in figures.items():
            metric, _, filter_name = key.partition(",")
            if not isinstance(value, float | int) or not filter_name or metric.endswith("_stderr"):
                continue
            error = f"{metric}_stderr,{filter_name}"
            label = metric if filter_name == "none" else f"{metric} ({filter_name})"
            rows.append(
                {
                    "task": task,
                    "metric": label,
                    "dense": value,
                    "dense_stderr": _number(figures.get(error)),
                    "profile": others[key],
                    "profile_stderr": _number(others.get(error)),
                    "difference": others[key] - value,
                }
            )
    return rows


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, float | int) else None  # lm-eval writes N/A


def _report(rows: list[dict[str, Any]], skipped: dict[str, float | int], loaded: LoadedModel, options: Options) -> None:
    if options.format == "json":
        print_json({"schema": "ffnskip-eval/v1", "model": loaded.id, **skipped, "rows": rows})
        return
    render(rows, _COLUMNS, options.format)
    console.talk.print(
        f"skip_ratio {skipped['skip_ratio']:.3f}, never_skip_fraction {skipped['never_skip_fraction']:.3f} over "
        f"{skipped['tokens_past_warm_up']} tokens past warm-up",
        highlight=False,
    )
