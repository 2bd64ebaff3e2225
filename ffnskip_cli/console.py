"""Talk and progress, all on stderr: stdout belongs to the data."""

import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text

from ffnskip.errors import FfnskipWarning

T = TypeVar("T")

# Lines are broken between words on a terminal; in a log or a pipe a sentence is one line.
talk = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())

_SECONDS_BETWEEN_LINES = 10.0


def mute() -> None:
    """Say nothing from now on but errors: another process of the same run does the talking."""
    talk.quiet = True


def error(sentence: str) -> None:
    """Say what went wrong."""
    talk.quiet = False
    _say("Error", "bold red", sentence)


def warn(sentence: str) -> None:
    """Say what the user should know before trusting the result."""
    _say("Warning", "bold yellow", sentence)


def hint(sentence: str) -> None:
    """Say what the user may want to do next."""
    _say("Hint", "bold cyan", sentence)


def track(steps: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield the steps and show how many of `total` are done: a bar on a terminal, now and then a line elsewhere."""
    if _can_animate():
        return _track_with_bar(steps, description, total)
    return _track_with_lines(steps, description, total)


@contextmanager
def own_warnings() -> Iterator[None]:
    """While inside, the runtime's warnings are said like all others, each time."""

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, FfnskipWarning):
            warn(str(message))
        else:
            usual(message, category, *place)

    with warnings.catch_warnings():
        usual = warnings.showwarning
        warnings.simplefilter("always", FfnskipWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


@contextmanager
def own_news() -> Iterator[None]:
    """While inside, what the runtime logs, which is work that takes long and is done once, is said, too."""
    logger, handler = logging.getLogger("ffnskip"), _Sayer()
    usual = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False  # or a program under `exec` that shows what is logged would say it once more
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        level, logger.propagate = usual
        logger.setLevel(level)


@contextmanager
def busy(description: str) -> Iterator[None]:
    """Say what is being done while it is being done: a spinner on a terminal, one line elsewhere."""
    if _can_animate():
        with talk.status(Text(f"{description} …")):
            yield
    else:
        talk.print(f"{description} …", markup=False)
        yield


class _Sayer(logging.Handler):
    """Says what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        talk.print(record.getMessage(), markup=False)


def _say(label: str, style: str, sentence: str) -> None:
    talk.print(Text.assemble((f"{label}:", style), f" {sentence}"))


def _can_animate() -> bool:
    return sys.stderr.isatty() and not talk.is_dumb_terminal


def _track_with_bar(steps: Iterable[T], description: str, total: int) -> Iterator[T]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=talk, redirect_stdout=False) as progress:
        yield from progress.track(steps, total=total, description=description)


def _track_with_lines(steps: Iterable[T], description: str, total: int) -> Iterator[T]:
    def show(done: int) -> float:
        now = time.monotonic()
        left = (now - started_at) / done * (total - done) if done else 0.0
        time_left = f", {timedelta(seconds=round(left))} left" if left >= 1 else ""
        talk.print(f"{description}: {done}/{total}{time_left}", markup=False)
        return now

    started_at = time.monotonic()
    shown_at = show(0)
    for done, step in enumerate(steps, start=1):
        yield step
        if done == total or time.monotonic() - shown_at >= _SECONDS_BETWEEN_LINES:
            shown_at = show(done)
