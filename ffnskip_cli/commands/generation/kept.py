"""What a run of `ffnskip generate` keeps of a model in the cache folder, so that the next need not import transformers.

That is what steps need to know of it besides its weights, which stay where they are (`ffnskip.fast.stored`), and its
tokenizer. It is kept once the model's own forward pass has been compared, and holds for the very files it was made of,
the packages that made it, and the processor that it was compared on.
"""

from __future__ import annotations

import hashlib
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ffnskip.cached import cache_dir, is_built
from ffnskip.profiles.schema import ModelInfo, Section
from ffnskip_cli.commands.generate import Options

SETTINGS, TOKENIZER = "start.json", "tokenizer.json"
_EDITION = 1  # of what is written; a new one when it changes
_PACKAGES = ("ffnskip", "torch", "transformers", "tokenizers")


class Kept(Section):
    """What is known of a model."""

    folder: str
    """Where the model lies."""
    stamp: dict[str, Any]
    """Of the files and packages that it holds for."""
    library: str
    """The compiled step that was compared."""
    model: ModelInfo
    """Which model it is, for profiles."""
    format: str
    """Of its matrices."""
    chat_template: str | None
    """Of its tokenizer."""
    special_tokens: dict[str, Any]
    """What a chat template may name."""
    stop_tokens: tuple[int, ...]
    """End an answer."""


def allows(options: Options) -> bool:
    """Whether a run with these options loads the model as it is stored, on a CPU, and nothing else."""
    model = options.model_options
    as_stored = (model.dtype, model.weights, model.device_map) == ("auto", "auto", None)
    alone = not (options.compare or options.other_weights or model.trust_remote_code)
    return as_stored and alone and model.device in ("auto", "cpu") and not options.model.lower().endswith(".gguf")


def place(folder: Path) -> Path:
    """Where it is kept of the model in a folder."""
    return cache_dir() / "starts" / hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]


def stamp(folder: Path) -> dict[str, Any]:
    """The model's files, and the versions of all that what is kept was made with."""
    found = {file.name: file.stat() for file in sorted(folder.iterdir()) if file.is_file()}
    files = {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in found.items()}
    return {"edition": _EDITION, "files": files, **{package: version(package) for package in _PACKAGES}}


def find(folder: Path) -> Kept | None:
    """What is kept of the model in a folder, if that still holds."""
    entry = place(folder)
    found = read(entry) if is_built(entry) else None
    return found if found is not None and found.stamp == stamp(folder) else None


def read(entry: Path) -> Kept | None:
    """What an entry says; None if it cannot be read."""
    try:
        return Kept.model_validate_json((entry / SETTINGS).read_bytes())
    except (OSError, ValidationError):
        return None
