"""Recognizing that memory ran out, on the host or on a device."""

import re

_WORDS = re.compile("out of memory|not enough memory|(can't|cannot) allocate memory|ALLOC_FAILED", re.IGNORECASE)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` is one of the ways in which Python, torch's allocators and the system say so."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which is slow to import
        return True
    return isinstance(error, RuntimeError | OSError) and _WORDS.search(str(error)) is not None
