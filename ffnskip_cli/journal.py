"""Measurements that are finished, on disk, so that a run which was killed need not repeat them.

What a long run measures is deterministic, so each figure can be found again by what it was measured on. A journal is a
file of JSON lines that is only ever appended to: a line that a kill cut short is the last one, and is measured anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ffnskip.errors import FfnskipError

T = TypeVar("T")


class Journal:
    """Remembers the values of computations by their keys; in memory only if it has no path.

    Args:
        path: the file; None to write nothing.
        subject: what every value depends on besides its key. A file about another subject is begun anew.
        resume: take over what the file holds; else it is begun anew.
    """

    def __init__(self, path: Path | None = None, subject: object = None, *, resume: bool = False) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        if path is None:
            return
        header = _digest(subject)
        if resume and path.exists():
            self._read(path, header)
        _write(path, "w", "".join(_line(key, value) for key, value in {"subject": header, **self._known}.items()))

    def remember(self, key: object, compute: Callable[[], T]) -> T:
        """The value of `compute`, which is only called if the journal does not hold it yet.

        Args:
            key: tells this computation from all others; plain data.
            compute: returns plain data. JSON keeps every bit of its numbers.
        """
        name = _digest(key)
        if name not in self._known:
            value = compute()
            self._known[name] = value
            if self._path is not None:
                _write(self._path, "a", _line(name, value))
        known: T = self._known[name]
        return known

    def discard(self) -> None:
        """Delete the file: the run is over."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self, path: Path, header: str) -> None:
        entries: dict[str, Any] = {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                key, value = json.loads(line)
            except (TypeError, ValueError):
                break
            entries[key] = value
        if entries.pop("subject", None) == header:
            self._known = entries


def _digest(key: object) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _line(key: str, value: object) -> str:
    return json.dumps([key, value]) + "\n"


def _write(path: Path, mode: str, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise FfnskipError(f"{path} cannot be written: {error.strerror}.") from error
