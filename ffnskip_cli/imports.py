"""Imports that take less time."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_UNUSED = ("sklearn", "scipy")


@contextmanager
def swift_imports(*, all_used: bool = False) -> Iterator[None]:
    """While inside, nothing is looked through for garbage, and scikit-learn and scipy cannot be imported.

    What an import makes stays: looking for garbage among it takes a fifth of torch's import. And where scikit-learn and
    scipy are installed, transformers imports them, for losses and a kind of assisted decoding, which no command of ours
    needs; they take a fifth of its own. Once transformers has been imported, nothing is hidden from it: it remembers
    what is installed.

    Args:
        all_used: hide nothing, as another program may need it.
    """
    hidden = [] if all_used or "transformers" in sys.modules else [name for name in _UNUSED if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # makes an import fail
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        for name in hidden:
            sys.modules.pop(name, None)
