"""How far a long run has got: a track shows it, and a journal keeps it, so that a run which was killed can go on.

What a long run measures is deterministic, so each figure can be found again by what it was measured on. A journal is a
file of JSON lines that is only ever appended to, each with a hash of its own; what a kill cut short, or a disk has
damaged, is measured anew.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from safetensors.torch import load, save
from torch import Tensor

from ffnskip.errors import FfnskipError
from ffnskip.files import refuse_strangers, replacing

T = TypeVar("T")


class Track(Protocol):
    """Passes an iterable on and shows how far it has got; measurements do not know where."""

    def __call__(self, steps: Iterable[T], description: str, total: int) -> Iterable[T]:
        """Yield the `total` items of `steps`."""


def silently(steps: Iterable[T], description: str, total: int) -> Iterable[T]:
    """The Track that shows nothing."""
    return steps


class Journal:
    """Remembers the values of computations by their keys; in memory only if it has no path.

    Args:
        path: the file; None to write nothing.
        subject: what every value depends on besides its key; what a file holds of other subjects is not used.
        resume: take over what the file holds; else it is begun anew.
    """

    def __init__(self, path: Path | None = None, subject: object = None, *, resume: bool = False) -> None:
        self._path = path
        self._subject: object = None
        self._known: dict[str, Any] = {}
        if path is None:
            return
        self._subject = subject
        try:
            if resume and (path.is_symlink() or path.exists()):
                refuse_strangers(path, "the journal")
                self._known = _read(path)
            else:
                self.discard()  # tensors of an earlier run, too
                path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except OSError as error:
            raise FfnskipError(f"{path} cannot be used: {error.strerror}.") from error

    def remember(self, key: object, compute: Callable[[], T]) -> T:
        """The value of `compute`, which is only called if the journal does not hold it yet.

        Args:
            key: tells this computation from all others; plain data.
            compute: returns plain data. JSON keeps every bit of its numbers.
        """
        if _digest([self._subject, key]) not in self._known:
            self.keep(key, compute())
        known: T = self.kept(key)
        return known

    def kept(self, key: object) -> Any:
        """The value that is kept under this key; None if there is none."""
        return self._known.get(_digest([self._subject, key]))

    def keep(self, key: object, value: object) -> None:
        """Write down a value, plain data, that was computed elsewhere."""
        name = _digest([self._subject, key])
        self._known[name] = value
        self._append(name, value)

    def remember_tensors(self, key: object, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The same for tensors by name, which are kept in a file of their own beside the journal's."""
        if self._path is None:
            return compute()
        file, name = self._tensor_file(self._path, key), _digest([self._subject, "tensors", key])
        try:
            if name in self._known and file.is_file():
                refuse_strangers(file, "the journal's")
                data = file.read_bytes()
                if hashlib.sha256(data).hexdigest() == self._known[name]:
                    # Copies, because products round by how their factors lie in memory, and the file's lie as they may.
                    return {name: tensor.clone() for name, tensor in load(data).items()}
            tensors = compute()
            data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
            with replacing(file) as temporary:
                temporary.write_bytes(data)
            file.chmod(0o644)
        except OSError as error:
            raise FfnskipError(f"{file} cannot be used: {error}.") from error
        self._known[name] = hashlib.sha256(data).hexdigest()
        self._append(name, self._known[name])
        return tensors

    def forget_tensors(self, key: object) -> None:
        """Delete what `remember_tensors` keeps under this key, if anything."""
        if self._path is not None:
            self._tensor_file(self._path, key).unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete the files: the run is over."""
        if self._path is None:
            return
        self._path.unlink(missing_ok=True)
        for file in self._path.parent.glob(f"{glob.escape(self._path.name)}.*.safetensors"):
            file.unlink(missing_ok=True)

    def _tensor_file(self, path: Path, key: object) -> Path:
        return path.with_name(f"{path.name}.{_digest([self._subject, key])[:16]}.safetensors")

    def _append(self, name: str, value: object) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                # On a line of its own, whatever a kill left before it.
                file.write(f"\n{json.dumps([name, value, _digest([name, value])])}")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FfnskipError(f"{self._path} cannot be written: {error.strerror}.") from error


def _read(path: Path) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(TypeError, ValueError, RecursionError):  # a line that was cut short
            name, value, digest = json.loads(line)
            if digest == _digest([name, value]):
                entries[str(name)] = value
    return entries


def _digest(key: object) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
