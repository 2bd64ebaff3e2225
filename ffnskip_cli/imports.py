"""Imports that take less time, and that Ctrl-C ends."""

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from ffnskip_cli import console

INTERRUPTED = 130  # the exit code of Ctrl-C
_UNUSED = ("sklearn", "scipy")


@contextmanager
def swift_imports(*, all_used: bool = False) -> Iterator[None]:
    """While inside, nothing is looked through for garbage, and scikit-learn and scipy cannot be imported.

    What an import makes stays: looking for garbage among it takes a fifth of torch's import. And where scikit-learn and
    scipy are installed, transformers imports them, for losses and a kind of assisted decoding, which no command of ours
    needs; they take a fifth of its own. Once transformers has been imported, nothing is hidden from it: it remembers
    what is installed. Ctrl-C ends the program at once: torch and numpy would swallow the exception, or break by it.

    Args:
        all_used: hide nothing, as another program may need it.
    """
    hidden = [] if all_used or "transformers" in sys.modules else [name for name in _UNUSED if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # makes an import fail
    collects = gc.isenabled()
    gc.disable()
    main = threading.current_thread() is threading.main_thread()  # others may set no handlers
    interrupts = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interrupts:
        signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        if interrupts:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if collects:
            gc.enable()
        for name in hidden:
            sys.modules.pop(name, None)


def _leave(*_: object) -> NoReturn:
    console.talk.show_cursor()  # which a spinner hides
    os._exit(INTERRUPTED)
