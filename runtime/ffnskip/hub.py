"""The Hugging Face Hub: the commit that a name stands for now, and its failures in words."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging

from ffnskip.errors import FfnskipError, reason

Kind = Literal["model", "dataset", "profile"]

# The client would wait for ever on a network that drops its packets.
_TIMEOUT_SECONDS = 10
_INSTEAD = {
    "model": "a local folder, a .gguf file or `demo`",
    "dataset": "a local .txt, .jsonl or .parquet file or `demo`",
    "profile": "a local file",
}
_NEITHER = {  # profiles have no ids without a slash
    "model": "neither a local folder, a .gguf file, `demo` nor a Hub id like org/name",
    "dataset": "neither a local .txt, .jsonl or .parquet file, `demo`, `self` nor a Hub id like org/name",
}
# Datasets enter no cache here: they are streamed, so a cached one was loaded by another program.
_ONCE = "run once with a network"
_TO_CACHE = {"model": _ONCE, "dataset": "load it once with `datasets.load_dataset`", "profile": _ONCE}
_IF_CACHED = {
    "model": "pass --offline if it was fetched before",
    "dataset": "pass --offline if `datasets.load_dataset` has cached it",
    "profile": "set HF_HUB_OFFLINE=1 if it was fetched before",  # not all that read a profile have the option
}


def commit_of(kind: Kind, name: str, revision: str | None = None) -> str | None:
    """The commit (40 hex digits) that `revision` of a Hub repository stands for now.

    One request with a time limit, made before anything else: later calls of the client retry for half a minute when
    there is no network. Raises what `hub_errors` translates, ConnectionError among it.
    """
    logging.set_verbosity_error()
    repo_type = "dataset" if kind == "dataset" else "model"
    try:
        sha: str | None = HfApi().repo_info(name, repo_type=repo_type, revision=revision, timeout=_TIMEOUT_SECONDS).sha
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception as error:  # whatever the HTTP library of the day raises
        raise ConnectionError(reason(error)) from error
    return sha


@contextmanager
def hub_errors(kind: Kind, name: str, offline: bool) -> Iterator[None]:
    """Turn any failure to read `name` from the Hub into one sentence that says what to do."""
    try:
        yield
    except FfnskipError:
        raise
    except Exception as error:
        raise FfnskipError(_sentence(error, kind, name, offline)) from error


def _sentence(error: Exception, kind: Kind, name: str, offline: bool) -> str:
    instead = f"or name {_INSTEAD[kind]}"
    match error:
        case HFValidationError():
            return f"{name!r} is neither a file or folder here nor a {kind} id like org/name: check it, {instead}"
        case GatedRepoError():
            return f"the {kind} {name} is gated: accept its terms on the Hugging Face Hub and set HF_TOKEN, {instead}"
        case RevisionNotFoundError():
            return f"the {kind} {name} has no such revision on the Hugging Face Hub: name another branch, tag or commit"
        case RepositoryNotFoundError():
            return (
                f"the Hugging Face Hub shows no {kind} {name}: check the spelling, set HF_TOKEN if it is private, "
                + instead
            )
        case OSError() if offline and "/" not in name:  # most likely a typing error, though old ids are as short
            return (
                f"{name} is {_NEITHER[kind]}, and no {kind} of the Hub with so short an id is in the local cache: "
                f"check the spelling, or {_TO_CACHE[kind]}"
            )
        case OSError() if offline:
            return (
                f"the {kind} {name} is not in the local Hugging Face cache and this run is offline: "
                f"{_TO_CACHE[kind]}, {instead}"
            )
        case OSError() if "/" not in name:
            return (
                f"{name} is {_NEITHER[kind]}, and the Hub could not be asked for a {kind} with so short an id "
                f"({reason(error)}): check the spelling, or {_IF_CACHED[kind]}"
            )
        case OSError():
            return (
                f"the {kind} {name} could not be fetched from the Hugging Face Hub ({reason(error)}): "
                f"{_IF_CACHED[kind]}, {instead}"
            )
    return f"the {kind} {name} cannot be read: {reason(error)}"
