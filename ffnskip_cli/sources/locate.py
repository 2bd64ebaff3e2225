"""Where a model that a user names lies on this disk, fetched or expanded first if it has to be.

Nothing here imports torch or transformers before something has to be made of a `.gguf` file, or the Hub's client
before the Hub is named.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ffnskip.cached import is_built
from ffnskip.errors import FfnskipError
from ffnskip.files import sha256_file
from ffnskip_cli.sources.demo import DEMO_MODEL_SHA256, demo_model_file
from ffnskip_cli.sources.failures import one_sentence
from ffnskip_cli.sources.gguf_files import described, expanded, expanded_folder
from ffnskip_cli.sources.names import looks_like_path, public_name

DEMO_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONFIG_FILES = ("*config*.json",)
MODEL_FILES = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.tiktoken", "*.txt")
# Sub-folders hold other formats, and consolidated*.safetensors the same weights once more under other names.
_HUB_EXTRAS = ["*/*", "consolidated*.safetensors"]


@dataclass(frozen=True)
class Located:
    """A folder with a model's configuration, tokenizer and weights, and what identifies it to others.

    See `ffnskip_cli.sources.models.LoadedModel`. `gguf` is the file with the weights if that is read as it is.
    """

    folder: Path
    id: str
    revision: str | None = None
    gguf_sha256: str | None = None
    gguf: Path | None = None
    note: str | None = None


@dataclass(frozen=True)
class Folder:
    """A model's folder, and what its files were like when they were looked at: size, times of writing, and inode."""

    path: Path
    files: dict[str, list[int]]

    @classmethod
    def seen(cls, path: Path) -> Folder:
        """As it is now; raises OSError if it cannot be read."""
        found = {file.name: file.stat() for file in sorted(path.iterdir()) if file.is_file()}
        files = {name: [at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino] for name, at in found.items()}
        return cls(Path(os.path.abspath(path)), files)

    @property
    def weights(self) -> list[Path]:
        """Its safetensors files."""
        return [self.path / name for name in self.files if name.endswith(".safetensors")]

    @property
    def unchanged(self) -> bool:
        """Whether its files are what they were."""
        return self == Folder.seen(self.path)


def locate(
    name: str,
    revision: str | None = None,
    *,
    files: Sequence[str] = MODEL_FILES,
    offline: bool = False,
    gguf_as_is: bool = False,
) -> Located:
    """Find `demo`, a local folder, a `.gguf` file, or `org/name[@revision]` on the Hugging Face Hub.

    Args:
        name: the user's.
        revision: of a Hub id.
        files: what to fetch of the Hub's, as patterns.
        offline: fetch nothing.
        gguf_as_is: leave quantized `.gguf` files as they are, where they can be read so.

    Raises:
        FfnskipError: it is nowhere.
    """
    base, _, at_revision = name.partition("@")
    if name == "demo" or os.path.exists(name):
        if revision:
            raise FfnskipError(f"a revision goes only with a Hub id, and {name} is none: leave --revision out")
        return locate_local(name, offline, gguf_as_is)
    if base == "demo" or os.path.exists(base):
        raise FfnskipError(f"a revision goes only with a Hub id, and {base} is none: leave @{at_revision} out")
    if looks_like_path(base, (".gguf",)):
        raise FfnskipError(f"no such file or folder: {name}")
    if revision and at_revision and revision != at_revision:
        raise FfnskipError(f"{name} and --revision {revision} name two revisions: give only one of them")
    return _fetch(base, revision or at_revision or None, files, offline)


def locate_local(name: str, offline: bool, gguf_as_is: bool = False) -> Located:
    """Find `demo`, a folder or a `.gguf` file; raises FfnskipError as `locate`."""
    if name == "demo":
        folder = expanded(lambda: demo_model_file(offline), DEMO_MODEL_SHA256)
        return Located(folder, DEMO_MODEL_ID, gguf_sha256=DEMO_MODEL_SHA256)
    path = Path(os.path.abspath(name))  # a symbolic link keeps its own name: files in the Hub's cache are links
    if path.is_dir():
        return Located(path, public_name(path))
    if path.suffix.lower() != ".gguf":
        raise FfnskipError(f"{name} is neither a folder nor a .gguf file: name the folder that holds config.json")
    with one_sentence(name):
        sha256 = sha256_file(path)
        why_not = _why_not_as_it_is(path) if gguf_as_is else None
    if gguf_as_is and why_not is None:
        return Located(described(path, sha256), public_name(path), gguf_sha256=sha256, gguf=path)
    note = why_not and f"{name} is expanded to bfloat16: {why_not}."
    return Located(expanded(lambda: path, sha256), public_name(path), gguf_sha256=sha256, note=note)


def locate_here(name: str, revision: str | None = None) -> Path | None:
    """A folder on this disk that `locate` may give, and gives for all but the Hub's; None if there is none.

    Nothing is fetched, asked or made for it.
    """
    if name == "demo" or os.path.isdir(name):
        folder = expanded_folder(DEMO_MODEL_SHA256) if name == "demo" else Path(os.path.abspath(name))
        return folder if not revision and (name != "demo" or is_built(folder)) else None
    base, _, at_revision = name.partition("@")
    if os.path.exists(base) or looks_like_path(base, (".gguf",)) or (revision and at_revision):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, revision=revision or at_revision or None, local_files_only=True))
    except Exception:  # `locate` says what it is
        return None


def is_current(folder: Path, name: str, revision: str | None = None, *, offline: bool = False) -> bool:
    """Whether `locate` gives the folder that `locate_here` gave: the Hub may name another commit by now."""
    if name == "demo" or os.path.isdir(name):
        return True
    from huggingface_hub import is_offline_mode

    from ffnskip.hub import commit_of

    base, _, at_revision = name.partition("@")
    try:
        return offline or is_offline_mode() or commit_of("model", base, revision or at_revision or None) == folder.name
    except Exception:  # `locate` says what it is
        return False


def _why_not_as_it_is(path: Path) -> str | None:
    from ffnskip.model.gguf_model import why_not_as_it_is

    return why_not_as_it_is(path)


def _fetch(name: str, revision: str | None, files: Sequence[str], offline: bool) -> Located:
    """Download what is missing of a Hub repository, of the files wanted; the snapshot folder is named by its commit."""
    from huggingface_hub import is_offline_mode, snapshot_download

    from ffnskip.hub import commit_of, hub_errors

    offline = offline or is_offline_mode()
    with hub_errors("model", f"{name}@{revision}" if revision else name, offline):
        if not offline:
            commit_of("model", name, revision)  # fails in seconds where the download would wait for ever
        folder = snapshot_download(
            name,
            revision=revision,
            local_files_only=offline,
            allow_patterns=list(files),
            ignore_patterns=_HUB_EXTRAS,
        )
    return Located(Path(folder), name, revision=Path(folder).name)
