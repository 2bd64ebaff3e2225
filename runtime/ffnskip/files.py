"""Files that are complete or untouched, and files that are read although somebody else may have made them."""

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ffnskip.errors import FfnskipError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary name beside `target` to write to; what was written takes its place at the end, if all went well.

    Makes the folder. What has taken its place is on the disk, whatever happens next. Raises OSError where the file
    cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file or folder written to the disk."""
    if os.name == "nt":  # where folders cannot be opened, nor files that are only read be synchronized
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems know no such thing for folders
            raise
    finally:
        os.close(descriptor)


def read_regular(path: Path, most: int, *, flags: int = 0) -> bytes | None:
    """The bytes of a regular file; None if there are more than `most`, of which no more is read.

    Raises OSError for anything else, such as a pipe, which would never end, or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | flags)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EISDIR) if stat.S_ISDIR(found.st_mode) else "No regular file")
        if found.st_size > most:
            return None
        data = file.read(most + 1)
    return data if len(data) <= most else None


def sha256_file(path: Path) -> str:
    """The SHA-256 of the file's bytes as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_strangers(path: Path, what: str, writable: int = 0o022) -> None:
    """Raise FfnskipError for a file or folder that others than its user can have put there or changed.

    Args:
        path: what must belong to this user or to the administrator, and be no link.
        what: what it is, for the sentence.
        writable: permissions that it must not give.
    """
    if not hasattr(os, "geteuid"):
        return
    found = path.lstat()
    loose = found.st_mode & writable
    if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX:
        loose = 0  # nobody can remove or rename what others have put there
    if found.st_uid not in (0, os.geteuid()) or stat.S_ISLNK(found.st_mode) or loose:
        raise FfnskipError(
            f"{what} {path} is a link, belongs to another user or can be written by others, so it is not used: remove "
            "it, or name another folder"
        )
