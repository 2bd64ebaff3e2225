"""Whether the native decode step can be compiled here; tests of it are skipped where there is no C++ compiler."""

import pytest

from ffnskip.errors import UnsupportedModelError
from ffnskip.fast.build import step_library


def _compiles() -> bool:
    try:
        step_library()
    except UnsupportedModelError:
        return False
    return True


COMPILES = _compiles()
needs_compiler = pytest.mark.skipif(not COMPILES, reason="there is no C++ compiler")
