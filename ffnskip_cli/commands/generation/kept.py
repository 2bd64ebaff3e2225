"""What a run of `ffnskip generate` keeps of a model in the cache folder, so that the next need not import transformers.

That is what steps need to know of it besides its weights, which stay where they are (`ffnskip.fast.stored`), and its
tokenizer. It is kept once the model's own forward pass has been compared, and holds for the very files it was made of,
the packages that made it, and the processor that it was compared on.
"""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import ffnskip
import ffnskip_cli
from ffnskip.cached import cache_dir, is_built
from ffnskip.profiles.schema import ModelInfo, Section
from ffnskip_cli.commands.generate import Options
from ffnskip_cli.sources.locate import Folder

SETTINGS, TOKENIZER = "start.json", "tokenizer.json"
_PACKAGES = ("torch", "transformers", "tokenizers")


class Kept(Section):
    """What is known of a model."""

    folder: str
    """Where the model lies."""
    files: dict[str, list[int]]
    """That it holds for, see `Folder`."""
    why_not: str | None
    """Why the model is loaded all the same; None if it need not be."""
    step: str
    """The compiled step that was compared."""
    model: ModelInfo
    """Which model it is, for profiles."""
    dtype: str
    """Of what is not packed."""
    format: str
    """Of its matrices."""
    max_length: int
    """The longest sequence that steps decode."""
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


def entries() -> Path:
    """The folder of all that is kept."""
    return cache_dir() / "starts"


def place(folder: Folder) -> Path:
    """Where it is kept of a model, by its files and by what keeps it: others have places of their own."""
    sources = [
        (path.stat().st_size, path.stat().st_mtime_ns)
        for package in (ffnskip, ffnskip_cli)
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py"))
    ]
    made_with = [str(folder.path), folder.files, sources, platform.node(), *map(version, _PACKAGES)]
    return entries() / hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:32]


def find(folder: Folder) -> Kept | None:
    """What is kept of the model in a folder."""
    entry = place(folder)
    return read(entry) if is_built(entry) else None


def read(entry: Path) -> Kept | None:
    """What an entry says; None if it cannot be read."""
    try:
        return Kept.model_validate_json((entry / SETTINGS).read_bytes())
    except (OSError, ValidationError):
        return None
