"""The folder that caches what is expensive to make twice: fetched demo data, dequantized weights, compiled code.

Code is run from it and weights are read from it, so its entries must belong to this user, and each is compared with the
hashes of its files whenever it is used. One that is damaged is made anew.
"""

import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from ffnskip.errors import FfnskipError
from ffnskip.files import refuse_strangers, sha256_file, sync

_HASHES = ".sha256.json"
_OTHERS = 0o002
_ABANDONED = 3600  # seconds, after which a build that is not finished has been killed


def cache_dir() -> Path:
    """`$FFNSKIP_CACHE`, or else `ffnskip` in `$XDG_CACHE_HOME`, or else `~/.cache/ffnskip`; it need not exist.

    Raises FfnskipError where there is no such home.
    """
    chosen = os.environ.get("FFNSKIP_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ffnskip"
    except RuntimeError as error:
        raise FfnskipError(f"the cache folder cannot be found ({error}): set FFNSKIP_CACHE to a folder") from error


def build_once(folder: Path, build: Callable[[Path], None], hashes: Mapping[str, str] | None = None) -> Path:
    """Return `folder`, after filling it with `build` if it is not there yet or is damaged.

    `build` writes into a temporary sibling that is renamed when it is complete, so a run that dies half-way leaves
    nothing under the final name, and of two runs that race both get a whole folder.

    Args:
        folder: two levels below the cache folder.
        build: fills a folder with files.
        hashes: SHA-256 of each file by its name, if that is known beforehand; else they are kept in the folder.

    Raises:
        FfnskipError: the cache cannot be read or written, or belongs to somebody else.
    """
    try:
        if _is_usable(folder, hashes):
            return folder
        folder.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _refuse_strangers_above(folder)
        _build(folder, build, hashes)
    except OSError as error:
        raise FfnskipError(
            f"cannot use the cache folder {folder.parent} ({error.strerror or error}): free some space there, "
            "or set FFNSKIP_CACHE to another folder"
        ) from error
    return folder


def is_built(folder: Path) -> bool:
    """Whether `build_once` would return the folder as it is, by the hashes that are kept in it."""
    try:
        return _is_usable(folder, None)
    except (OSError, FfnskipError):
        return False


def _is_usable(folder: Path, hashes: Mapping[str, str] | None) -> bool:
    """Whether a folder is there and whole; raises FfnskipError for one that others can have written to."""
    if not (folder.is_symlink() or folder.exists()):
        return False
    _refuse_strangers_above(folder)
    for file in (folder, *folder.rglob("*")):
        refuse_strangers(file, "the cache entry")
    return _is_whole(folder, hashes)


def discard(folder: Path) -> None:
    """Remove an entry, if it can be removed."""
    shutil.rmtree(folder, ignore_errors=True)


def _refuse_strangers_above(folder: Path) -> None:
    """Whoever owns a folder above can put another one in the place of this."""
    for above in (folder.parent.parent, folder.parent):
        refuse_strangers(above.resolve(), "the cache folder", _OTHERS)


def _is_whole(folder: Path, hashes: Mapping[str, str] | None) -> bool:
    """Whether the folder has the files that it should have, and no others, and none of them has changed."""
    found = _files(folder)
    kept = found.pop(_HASHES, None)
    if hashes is None:
        try:
            hashes = json.loads(kept.read_bytes()) if kept else {}
        except ValueError:
            return False
    if not isinstance(hashes, Mapping) or not hashes or found.keys() != hashes.keys():
        return False
    return all(stat.S_ISREG(file.lstat().st_mode) and sha256_file(file) == hashes[name] for name, file in found.items())


def _files(folder: Path) -> dict[str, Path]:
    """All that is in it and no folder, by the names from there."""
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if not file.is_dir()}


def _build(folder: Path, build: Callable[[Path], None], hashes: Mapping[str, str] | None) -> None:
    _sweep(folder)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        build(partial)
        if hashes is None:
            made = {name: sha256_file(file) for name, file in _files(partial).items()}
            (partial / _HASHES).write_text(json.dumps(made, indent=0))
        for file in partial.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
            sync(file)
        partial.chmod(0o755)  # as any folder: a temporary one is its owner's alone
        sync(partial)
        _take_place(partial, folder, hashes)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _take_place(partial: Path, folder: Path, hashes: Mapping[str, str] | None) -> None:
    """Rename the new folder to its final name, unless another run was first; a damaged one makes way."""
    try:
        partial.rename(folder)
        return
    except OSError:
        if not folder.is_dir():  # a folder that is not empty cannot be renamed over
            raise
    if not _is_whole(folder, hashes):
        damaged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        folder.rename(damaged)
        partial.rename(folder)
        shutil.rmtree(damaged, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what builds of this folder have left that were killed."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
