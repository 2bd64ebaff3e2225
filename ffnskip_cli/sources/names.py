"""What a local file or folder is called in a profile."""

import re
from pathlib import Path

_MOST = 200  # characters that a profile allows


def public_name(path: Path) -> str:
    """The base name of `path`, never its folders, in the form that a profile accepts.

    What could be read as a path or a drive is replaced: colons, backslashes, control characters, a leading dot or ~.
    """
    name = re.sub(r"[:\\]|^[.~]+", "_", path.name)
    return "".join(letter if letter.isprintable() else "_" for letter in name)[:_MOST] or "_"
