"""What the tests of several commands share."""

from pathlib import Path

import pytest
from support.cli import SMALL


@pytest.fixture
def calibrate(plateau_folder: Path, text_file: Path) -> tuple[object, ...]:
    """The start of a small calibration's command line."""
    return ("calibrate", plateau_folder, "--dataset", text_file, *SMALL)
