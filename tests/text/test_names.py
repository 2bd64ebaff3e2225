"""Names of local files in a profile."""

from pathlib import Path

import pytest
from support.factories import make_profile

from ffnskip_cli.sources.names import public_name


@pytest.mark.parametrize(
    "name", ["plain.txt", ".hidden.txt", "a:b.txt", "..", "~x", "back\\slash", "x" * 300, "li\nne"]
)
def test_every_name_is_one_that_a_profile_accepts(name: str) -> None:
    assert make_profile(id=public_name(Path("/some/where") / name)).model.id


def test_a_plain_name_stays_as_it_is_and_loses_its_folders() -> None:
    assert public_name(Path("/home/me/notes.txt")) == "notes.txt"
