"""Names of models and texts: telling those of the Hugging Face Hub from paths."""

import re
from pathlib import Path

_LONGEST = 200  # characters that a profile allows


def looks_like_path(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether `name` can only be meant as a path: a Hub id has at most one slash and no backslash."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.lower().endswith(suffixes)


def public_name(path: Path) -> str:
    """The base name of `path`, never its folders, in the form that a profile accepts.

    What could be read as a path or a drive is replaced: colons, backslashes, control characters, a leading dot or ~.
    """
    name = re.sub(r"[:\\]|^[.~]+", "_", path.name)
    return "".join(letter if letter.isprintable() else "_" for letter in name)[:_LONGEST] or "_"
