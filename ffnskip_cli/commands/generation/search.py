"""Look for what an earlier run has kept of a model, while torch is imported: both take their time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ffnskip.errors import FfnskipError
from ffnskip_cli import console
from ffnskip_cli.commands.generate import Options
from ffnskip_cli.commands.generation import kept
from ffnskip_cli.commands.generation.speaker import Speaker
from ffnskip_cli.imports import swift_imports
from ffnskip_cli.sources.locate import is_current, locate_here


class Search:
    """Begins when it is made, in the background.

    Args:
        options: the command line's.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._found = ThreadPoolExecutor(1).submit(self._find) if kept.allows(options) else None

    def _find(self) -> tuple[Path, kept.Kept] | None:
        name, asked = self._options.model, self._options.model_options
        try:
            folder = locate_here(name, asked.revision)
            found = None if folder is None else kept.find(folder)
            if folder is None or found is None:
                return None
            return (folder, found) if is_current(folder, name, asked.revision, offline=asked.offline) else None
        except (OSError, FfnskipError):  # a folder that cannot be read, or no cache folder
            return None

    def speaker(self, text: str) -> Speaker | None:
        """A speaker for a prompt; None where nothing is kept, or it does not do for this prompt or profile."""
        if self._found is None:
            return None
        with swift_imports():
            from ffnskip_cli.commands.generation.quick import QuickSpeaker

        if (found := self._found.result()) is None:
            return None
        try:
            with console.busy(f"Loading {self._options.model}, as checked before"):
                return QuickSpeaker(self._options, text, *found)
        except FfnskipError:  # the model itself is loaded instead, and says in a sentence whatever is wrong
            return None
