"""The errors a user can cause, and the warnings. Each message is one plain sentence that says what to change."""

import re

_NO_MEMORY = re.compile("out of memory|not enough memory|(can't|cannot) allocate memory|ALLOC_FAILED", re.IGNORECASE)


class FfnskipError(Exception):
    """A mistake in the input: the command line prints the sentence and exits with code 2."""


class ProfileError(FfnskipError):
    """A profile that cannot be read, breaks the schema, or belongs to another model."""


class UnsupportedModelError(FfnskipError):
    """A model whose feed-forward blocks cannot be wrapped, or not with proof that nothing else changed."""


class FfnskipWarning(UserWarning):
    """What a user should know before trusting the result; the command line prints the sentence."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a device, as Python, torch's allocators and the system say it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which is slow to import
        return True
    return isinstance(error, RuntimeError | OSError) and _NO_MEMORY.search(str(error)) is not None


def reason(error: Exception) -> str:
    """What `error` says, on one line and short enough to stand in a sentence."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if isinstance(error, KeyError):  # which says the key and nothing else
        text = f"the name {text} is missing or unknown"
    return text if len(text) <= 200 else text[:199] + "…"
