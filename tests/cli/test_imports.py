"""While something slow is imported, Ctrl-C ends the program."""

import signal
import subprocess
import sys

import pytest

from ffnskip_cli.imports import swift_imports


def test_an_interrupt_while_something_is_imported_ends_the_program_whatever_the_import_makes_of_it() -> None:
    swallows = """
import os, signal
from ffnskip_cli.imports import swift_imports
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background has not
with swift_imports():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        pass
    print("goes on")
"""
    result = subprocess.run([sys.executable, "-c", swallows], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (130, "")


@pytest.mark.parametrize(("usual", "kept"), [(signal.default_int_handler, False), (signal.SIG_IGN, True)])
def test_interrupts_are_as_they_were_once_all_is_imported(usual: signal.Handlers, kept: bool) -> None:
    before = signal.signal(signal.SIGINT, usual)
    try:
        with swift_imports():
            assert (signal.getsignal(signal.SIGINT) is usual) == kept
        assert signal.getsignal(signal.SIGINT) is usual
    finally:
        signal.signal(signal.SIGINT, before)
