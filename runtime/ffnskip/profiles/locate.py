"""Where a profile lies: in a file, in a repository of the Hugging Face Hub, or among those that come with ffnskip.

The Hub's files stay in the Hub's own cache, whose links are followed here: its client has made them, and no repository.
What they lead to is as little believed as any file. Importing this imports no torch.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ffnskip.errors import ProfileError
from ffnskip.files import read_regular
from ffnskip.profiles.strict_yaml import MAX_BYTES

AUTO = "auto"
_SCHEME = "hf://"
_ON_HUB = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(/(?P<file>[^@]+))?(@(?P<revision>[^@]+))?")
_SUFFIXES = (".yaml", ".yml")
_IS_PROFILE = re.compile(rb"""^["']?schema["']?:\s*["']?ffnskip/""", re.MULTILINE)


@dataclass(frozen=True)
class Located(os.PathLike[str]):
    """A profile's file, and where it came from.

    Attributes:
        path: the file, on this machine.
        name: the path as it was given, or `hf://org/repo/file.yaml@commit`.
        repo: the Hub's repository; None for a local file.
        offline: whether only what was fetched before may be used.
    """

    path: Path
    name: str
    repo: str | None = None
    offline: bool = False

    def __fspath__(self) -> str:
        return str(self.path)

    def beside(self, name: str) -> Path:
        """The file of that name in the profile's own folder, of the same commit; it need not be there.

        Raises FfnskipError if the Hub does not give it.
        """
        if self.repo is None:
            return self.path.parent / name
        file, _, commit = self.name.removeprefix(f"{_SCHEME}{self.repo}/").rpartition("@")
        wanted = str(PurePosixPath(file).with_name(name))
        return (_snapshot(self.repo, commit, [glob.escape(wanted)], self.offline) / wanted).resolve()


def is_auto(profile: object) -> bool:
    """Whether this asks for the profile that comes with ffnskip, and is no file of that name."""
    return profile == AUTO and not os.path.isfile(AUTO)


def shared_profiles() -> Path:
    """The folder of those that come with ffnskip: inside the package if it was installed, else at the clone's top."""
    package = Path(__file__).parents[1]
    inside = package / "shared_profiles"
    return inside if inside.is_dir() else package.parents[1] / "profiles"


def locate(profile: str | os.PathLike[str], *, offline: bool = False) -> Located:
    """Find a profile, and fetch it if it lies on the Hub.

    Args:
        profile: a path, `hf://org/repo/path/file.yaml[@revision]`, or `org/repo[@revision]` of a repository with one
            profile. What exists as a path is one; so is what ends in .yaml without `hf://`, and a `pathlib.Path`.
        offline: use only what was fetched before.

    Raises:
        ProfileError: the name on the Hub is not of that form, or the repository has no such profile or several.
        FfnskipError: the Hub does not give it.
    """
    if isinstance(profile, Located):
        return profile
    name = os.fspath(profile)
    repo, file, revision = _on_hub(profile)
    if repo is None:
        if os.path.isdir(name):
            raise ProfileError(f"{name} cannot be read: it is a folder, so name a profile in it.")
        return Located(Path(name), name)
    if file is None:
        found = _in_repository(repo, revision, offline)
        if len(found) != 1:
            raise ProfileError(_not_one(repo, found))
        return found[0]
    folder = _snapshot(repo, revision, [glob.escape(file)], offline)
    if not (folder / file).is_file():
        raise ProfileError(f"{repo} has no file {file} at commit {folder.name}.")
    return _fetched(repo, folder, folder / file, offline)


def locate_all(place: str | os.PathLike[str], *, offline: bool = False) -> list[Located]:
    """Every profile below a folder, or in a repository of the Hub; of anything else the one that `locate` finds.

    Other YAML files are passed over. Raises as `locate`.
    """
    if os.path.isdir(place):
        return [Located(path, str(path)) for path in _profiles_below(Path(place))]
    repo, file, revision = _on_hub(place)
    return [locate(place, offline=offline)] if repo is None or file else _in_repository(repo, revision, offline)


def _on_hub(profile: str | os.PathLike[str]) -> tuple[str | None, str | None, str | None]:
    """Repository, file and revision; no repository for what is a path."""
    if not isinstance(profile, str) or os.path.exists(profile):
        return None, None, None
    match = _ON_HUB.fullmatch(profile.removeprefix(_SCHEME))
    if profile.startswith(_SCHEME):
        if match is None:
            raise ProfileError(f"{profile} is no name on the Hugging Face Hub: write hf://org/repo/file.yaml@revision.")
    elif match is None or match["file"] or profile.lower().endswith(_SUFFIXES):
        return None, None, None
    return match["repo"], match["file"], match["revision"]


def _in_repository(repo: str, revision: str | None, offline: bool) -> list[Located]:
    folder = _snapshot(repo, revision, [f"*{suffix}" for suffix in _SUFFIXES], offline)
    return [_fetched(repo, folder, path, offline) for path in _profiles_below(folder)]


def _fetched(repo: str, folder: Path, path: Path, offline: bool) -> Located:
    name = f"{_SCHEME}{repo}/{path.relative_to(folder).as_posix()}@{folder.name}"
    return Located(path, name, repo, offline)


def _profiles_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and _is_profile(path))


def _is_profile(path: Path) -> bool:
    try:
        return _IS_PROFILE.search(read_regular(path, MAX_BYTES) or b"") is not None
    except OSError:
        return False


def _not_one(repo: str, found: Sequence[Located]) -> str:
    if not found:
        return f"{repo} is no file or folder here, and the repository of that name on the Hub holds no skip profile."
    *others, last = (located.name for located in found)
    return f"{repo} holds {len(found)} profiles, so name one: {', '.join(others)} or {last}."


def _snapshot(repo: str, revision: str | None, patterns: list[str], offline: bool) -> Path:
    """The folder, named by the commit, with those files of a repository that match a pattern, as far as there are any.

    Raises FfnskipError if the Hub cannot be asked or refuses.
    """
    from huggingface_hub import is_offline_mode, snapshot_download

    from ffnskip.hub import commit_of, hub_errors

    offline = offline or is_offline_mode()
    with hub_errors("profile", repo, offline):
        if not offline:
            commit_of("profile", repo, revision)  # fails in seconds where the download would wait for ever
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=offline))
