"""Files that are complete or untouched, and the folder that caches what is expensive to make twice.

It keeps fetched demo data, dequantized weights and compiled code.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ffnskip.errors import FfnskipError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary name beside `target` to write to; what was written takes its place at the end, if all went well.

    Makes the folder. Raises OSError where the file cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def cache_dir() -> Path:
    """`$FFNSKIP_CACHE`, or else `ffnskip` in `$XDG_CACHE_HOME`, or else `~/.cache/ffnskip`; it need not exist."""
    if chosen := os.environ.get("FFNSKIP_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ffnskip"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, after filling it with `build` if it is not there yet.

    `build` writes into a temporary sibling that is renamed when it is complete, so a run that dies half-way leaves
    nothing under the final name, and of two runs that race both get a whole folder. Raises FfnskipError if the cache
    cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            build(partial)
            partial.chmod(0o755)  # as any folder: a temporary one is its owner's alone
            _rename_unless_there(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise FfnskipError(
            f"cannot write to the cache folder {folder.parent} ({error.strerror or error}): free some space there, "
            "or set FFNSKIP_CACHE to another folder"
        ) from error
    return folder


def sha256_file(path: Path) -> str:
    """The SHA-256 of the file's bytes as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rename_unless_there(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        # A folder that is not empty cannot be renamed over: another run was first, and its content is the same.
        if not folder.is_dir():
            raise
