"""What transformers makes of a `.gguf` file, kept in the cache folder: that takes it a while."""

from collections.abc import Callable
from pathlib import Path

from ffnskip.cached import build_once, cache_dir

_EDITION = 2  # of what is written; a new one when it changes, as what was written before is kept


def described(path: Path, sha256: str) -> Path:
    """The folder with the configuration and the tokenizer of a `.gguf` file, made once for each content of a file."""

    def build(folder: Path) -> None:
        from ffnskip_cli.sources.gguf_reading import describe

        describe(path, folder)

    return build_once(cache_dir() / "gguf" / f"{sha256}-described-{_EDITION}", build)


def expanded(find: Callable[[], Path], sha256: str) -> Path:
    """The folder with the weights of a `.gguf` file in bfloat16 and its tokenizer, made once for each content.

    Args:
        find: gives the file, if it is needed.
        sha256: of the file.
    """

    def build(folder: Path) -> None:
        from ffnskip_cli.sources.gguf_reading import expand

        expand(find(), folder)

    return build_once(expanded_folder(sha256), build)


def expanded_folder(sha256: str) -> Path:
    """Where `expanded` puts the weights of a file of that content."""
    return cache_dir() / "gguf" / f"{sha256}-bfloat16-{_EDITION}"
