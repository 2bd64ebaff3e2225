"""What loading a model raises, in one sentence."""

import contextlib
from collections.abc import Iterator

from ffnskip.errors import FfnskipError, out_of_memory, reason


@contextlib.contextmanager
def one_sentence(name: str) -> Iterator[None]:
    """Turn whatever transformers raises on a folder or file that it cannot load into one sentence."""
    try:
        yield
    except FfnskipError:
        raise
    except Exception as error:  # a broken folder makes it raise nearly any class
        if out_of_memory(error):
            raise FfnskipError(
                f"{name} does not fit into memory: try --dtype bfloat16, --device-map auto or --device cpu"
            ) from error
        if "trust_remote_code" in str(error):
            raise FfnskipError(
                f"{name} brings its own Python code: pass --trust-remote-code if you trust its authors"
            ) from error
        raise FfnskipError(f"{name} cannot be loaded: {reason(error)}") from error
