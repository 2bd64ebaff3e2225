"""The tasks of lm-eval that an eval runs, among them those that come with ffnskip."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnskip.errors import FfnskipError, reason
from ffnskip_cli import console
from ffnskip_cli.evaluation.documents import FORMATS

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM

OWN = Path(__file__).with_name("tasks")
_log = logging.getLogger("lm_eval")
Results = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How lm-eval runs tasks; each as in its `simple_evaluate`, and None is a task's own."""

    num_fewshot: int | None = None
    batch_size: str = "1"
    limit: int | None = None
    max_gen_toks: int | None = None
    apply_chat_template: bool = False


class LmTasks:
    """Tasks, groups and tags by their names, with their data.

    Args:
        names: as in --tasks.
        data: local copies of tasks' data, by the names of the tasks.
        include_path: a folder of further tasks.
        settings: how they are run.

    Raises:
        FfnskipError: there is no such task, or its data cannot be had.
    """

    def __init__(
        self, names: Sequence[str], data: Mapping[str, Path], include_path: Path | None, settings: Settings
    ) -> None:
        from lm_eval.tasks import TaskManager

        self._settings = settings
        self._loaded: list[Task | Group] = []
        self.tasks: dict[str, Task] = {}
        self.groups: dict[str, Group] = {}
        if not names:
            return
        with console.busy("Looking for tasks"), redirect_stdout(sys.stderr), quiet():
            folders = [OWN] if include_path is None else [OWN, include_path]
            self._manager = TaskManager(include_path=folders, include_defaults=False)
            if not self._found(names, data, include_path):  # there; looking through all of lm-eval's takes ten seconds
                self._manager = TaskManager(include_path=folders)
                self._load_all(names, data)

    def _found(self, names: Sequence[str], data: Mapping[str, Path], include_path: Path | None) -> bool:
        if any(name not in self._manager.task_index for name in names):
            return False
        try:
            self._load_all(names, data)
        except FfnskipError:
            if include_path is None:
                raise
            return False  # a task of others may build on lm-eval's
        return True

    def _load_all(self, names: Sequence[str], data: Mapping[str, Path]) -> None:
        self._loaded, self.tasks, self.groups = [], {}, {}
        for name in names:
            if not (matches := self._manager.match_tasks([name])):
                raise FfnskipError(
                    f"There is no task {name}: `lm_eval ls tasks` lists those of lm-eval, and docs/evaluating.md "
                    "those of ffnskip."
                )
            for match in matches:
                self._load(match, data.get(match, data.get(name)))

    def evaluate(self, model: HFLM) -> Results:
        """What lm-eval's `simple_evaluate` finds, with its samples."""
        from lm_eval import simple_evaluate

        settings = self._settings
        most = settings.max_gen_toks
        with redirect_stdout(sys.stderr):
            results: Results = simple_evaluate(
                model=model,
                tasks=self._loaded,
                num_fewshot=settings.num_fewshot,
                batch_size=settings.batch_size,
                limit=settings.limit,
                gen_kwargs=None if most is None else {"max_gen_toks": most},
                apply_chat_template=settings.apply_chat_template,
                log_samples=True,
                bootstrap_iters=0,  # `errors` draws pairs
                task_manager=self._manager,
            )
        return results

    def aggregation(self, task: str, metric: str) -> Callable[[Sequence[Any]], float] | None:
        """What makes a task's figure of its documents' values; None if that is the mean."""
        from lm_eval.api.metrics import mean

        found: Callable[[Sequence[Any]], float] = self.tasks[task].aggregation()[metric]
        return None if found is mean else found

    def weights(self, group: str, metric: str, sizes: Mapping[str, int]) -> dict[str, float]:
        """The weights, which sum to 1, with which the figures of a group's tasks enter its own."""
        found = self.groups[group]
        by_size = next(each.weight_by_size for each in found.aggregate_metric_list if each.metric == metric)
        counts = {task.task_name: sizes[task.task_name] if by_size else 1 for task in found.get_all_tasks()}
        return {name: count / sum(counts.values()) for name, count in counts.items()}

    def _load(self, name: str, file: Path | None) -> None:
        entry = self._manager.task_index[name]
        if file is not None and name in self._manager.all_tags:
            for member in sorted(entry.tags):
                self._load(member, file)
            return
        if file is not None and name in self._manager.all_groups:
            raise FfnskipError(f"{name} is a group, and --data is the data of one task: name one of its tasks.")
        spec: object = name
        if file is not None:  # a group of one is how lm-eval changes a task's settings
            spec = {"group": "local", "task": [{"task": name, **_local(entry.cfg, file)}]}
        try:
            loaded = self._manager.load(spec)  # before the model is
        except FfnskipError:
            raise
        except Exception as error:  # tasks run code of their own, and their data come from anywhere
            what = f"with {file}" if file else "with its data from the network"
            raise FfnskipError(
                f"The task {name} cannot be loaded {what} ({reason(error)}): --data {name}=FILE takes a local copy."
            ) from error
        self.tasks |= loaded["tasks"]
        if file is None:
            self.groups |= loaded.get("groups", {})
        self._loaded += [self.groups[name]] if name in self.groups else list(loaded["tasks"].values())


def _local(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The settings by which a task takes its documents from a file; examples for the prompt are the file's others."""
    if "custom_dataset" in config:
        return {"dataset_kwargs": {"file": str(file)}}
    kind = FORMATS.get(file.suffix)
    if kind is None:
        raise FfnskipError(f"{file} cannot be read: name a file that ends with {', '.join(FORMATS)}.")
    source = {"dataset_path": kind, "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(file)}}}
    splits = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": "test"}
    return source | splits


@contextmanager
def quiet() -> Iterator[None]:
    """Without what lm-eval warns of by the way: models that are loaded already, metrics without settings."""
    level = _log.level
    _log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _log.setLevel(level)
