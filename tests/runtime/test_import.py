"""`import ffnskip`, which imports a name when it is first used."""

import subprocess
import sys

import pytest

import ffnskip


def test_importing_it_or_reading_a_profile_does_not_wait_for_torch() -> None:
    listed = "set(ffnskip.__all__) - {*dir(ffnskip)}"
    code = f"import sys, ffnskip; ffnskip.load_profile; print('torch' in sys.modules, {listed})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False set()\n"


@pytest.mark.parametrize("name", ffnskip.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(ffnskip, name).__name__ == name


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ffnskip' has no attribute 'nothing'"):
        _ = ffnskip.nothing
