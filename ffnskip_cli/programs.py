"""Run another Python program in this process, with a profile on every model that it loads."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import finalize, ref

from transformers import PreTrainedModel

from ffnskip.errors import FfnskipError
from ffnskip.general.apply import apply
from ffnskip.general.walk import Walk
from ffnskip.general.wrap import Applied
from ffnskip.profiles.identity import shared_profile
from ffnskip.profiles.locate import is_auto
from ffnskip_cli import console
from ffnskip_cli.sources.profiles import find_profile

_PYTHON = ("python", "python3")


@contextmanager
def on_every_load(profile: str, *, offline: bool = False, **settings: Any) -> Iterator[None]:
    """While inside, what ``from_pretrained`` gives has the profile on; then that is taken off, and summed up on stderr.

    A model that the profile does not fit is left as it is, with a warning; so is a program that loads none.

    Args:
        profile: its name, or `auto`.
        offline: whether it may only be one that was fetched before.
        settings: for `ffnskip.apply`.
    """
    found = None if is_auto(profile) else find_profile(profile, offline=offline)
    own = PreTrainedModel.__dict__["from_pretrained"]
    at_work: list[ref[Applied]] = []
    reports = []

    def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        loaded = own.__func__(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        if not model.can_generate():
            return loaded
        try:
            chosen = found or shared_profile(model)
            applied = apply(model, chosen, **settings)
        except FfnskipError as error:
            console.warn(f"{type(model).__name__} is loaded without the profile: {error}")
        else:
            at_work.append(ref(applied))  # the model's hooks hold it, as long as the program holds the model
            reports.append(finalize(applied, _say_skipped, applied.walk))
            _say_loaded(applied, chosen.name)
        return loaded

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    ended = False
    try:
        yield
        ended = True
    except SystemExit:
        ended = True
        raise
    finally:
        PreTrainedModel.from_pretrained = own
        if ended and not at_work:
            console.warn("The program has loaded no model that the profile could be put on: nothing was skipped.")
        for report in reports:
            report()
        for left in filter(None, (seen() for seen in at_work)):
            left.remove()


def _say_loaded(applied: Applied, profile: str) -> None:
    way = "" if applied.why_general is None else f", by the general path: {applied.why_general}"
    name = type(applied.model).__name__
    console.talk.print(f"{name} is loaded with the profile {profile} on{way}", highlight=False, markup=False)


def _say_skipped(walk: Walk) -> None:
    stats = walk.stats
    if stats.tokens:
        console.talk.print(
            f"skip_ratio {stats.skip_ratio:.3f}, never_skip_fraction {stats.never_skip_fraction:.3f} over "
            f"{stats.tokens} tokens past warm-up",
            highlight=False,
        )


def run_program(words: Sequence[str]) -> None:
    """Run a Python program as its own command line would: a script, an installed command, or ``python`` and the rest.

    Raises:
        FfnskipError: there is no such program, or it is not in Python.
        SystemExit: the program's own.
    """
    name, *arguments = words
    if Path(name).name in _PYTHON and arguments:
        if arguments[0] == "-m" and len(arguments) > 1:
            sys.argv[:], sys.path[0] = arguments[1:], os.getcwd()
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            return
        if arguments[0] == "-c" and len(arguments) > 1:
            sys.argv[:], sys.path[0] = ["-c", *arguments[2:]], ""
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
            return
        if arguments[0].startswith("-"):
            raise FfnskipError(f"Of Python's own options there are -m and -c here, and not {arguments[0]}.")
        name, *arguments = arguments
    beside = shutil.which(name, path=str(Path(sys.executable).parent))  # what is installed where this runs
    found = name if Path(name).is_file() else beside or shutil.which(name)
    if found is None:
        raise FfnskipError(f"There is no program {name}.")
    if not _in_python(Path(found)):
        raise FfnskipError(f"{name} is no Python program, so no profile can be put on what it loads.")
    sys.argv[:], sys.path[0] = [found, *arguments], str(Path(found).absolute().parent)
    runpy.run_path(found, run_name="__main__")


def _in_python(program: Path) -> bool:
    """Whether a file is a script for Python, by its name or by its first lines."""
    with program.open("rb") as file:
        return program.suffix == ".py" or b"python" in file.read(512).partition(b"\nimport")[0]
