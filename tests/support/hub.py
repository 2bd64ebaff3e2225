"""Repositories as the Hugging Face Hub's client keeps them, whose files are links, and a Hub that cannot be reached."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache_repository(cache: Path, repo: str, folder: Path, revision: str = "main") -> Path:
    """Put a folder's files into a cache as that repository at `COMMIT`, each a link to a blob."""
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / revision).write_text(COMMIT)
    (home / "blobs").mkdir(exist_ok=True)
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob, link = home / "blobs" / str(number), snapshot / file.relative_to(folder)
        blob.write_bytes(file.read_bytes())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot


class OnlineHub:
    """A Hub that is reached through the two calls that reach it: every repository is the one at `COMMIT` in a cache.

    Attributes:
        fetched: repository, revision and patterns of each download.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.fetched: list[tuple[str, str | None, list[str]]] = []
        self._cache = cache
        monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self._download)
        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *args, **kwargs: SimpleNamespace(sha=COMMIT))

    def _download(self, repo: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool) -> str:
        assert not local_files_only
        self.fetched.append((repo, revision, allow_patterns))
        return str(self._cache / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT)
