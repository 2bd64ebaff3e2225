"""Find and read a profile by the name that a user gives, and say which one it is where the name leaves that open."""

import os

from ffnskip.profiles.locate import Located, locate
from ffnskip.profiles.profile import Profile, load_profile
from ffnskip_cli import console


def find_profile(name: str | os.PathLike[str], *, offline: bool = False) -> Located:
    """Where the profile lies, as `ffnskip.profiles.locate.locate` finds it."""
    located = locate(name, offline=offline)
    if located.name != name:
        console.talk.print(f"The profile is {located.name}", markup=False, highlight=False)
    return located


def read_profile(
    name: str | os.PathLike[str], *, offline: bool = False, with_weights: bool = False
) -> tuple[Profile, Located]:
    """The profile and where it was found, as `ffnskip.load_profile` reads it."""
    located = find_profile(name, offline=offline)
    return load_profile(located, with_weights=with_weights), located
