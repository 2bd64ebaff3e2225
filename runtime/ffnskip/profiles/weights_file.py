"""The file with a profile's weights, as bytes. Importing this imports no torch."""

import hashlib
from pathlib import Path

from ffnskip.errors import ProfileError
from ffnskip.profiles.strict_yaml import sentence

MAX_BYTES = 8 * 2**30


def read_weights_file(path: Path, sha256: str) -> bytes:
    """Read the file; raises ProfileError if it is missing, or its hash is not the one that the profile names."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise error_in(path, f"larger than {MAX_BYTES // 2**30} GiB")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a file name"
        raise error_in(path, f"cannot be read ({reason}), and the profile needs it") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise error_in(path, "not the file that the profile was made with, its sha256 is another one")
    return data


def error_in(source: Path | str, what: str, tensor: str = "") -> ProfileError:
    """The error that names the file and, if there is one, the tensor."""
    return ProfileError(sentence(str(source), tensor, what))
