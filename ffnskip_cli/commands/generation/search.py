"""Look for what an earlier run has kept of a model, while torch is imported: both take their time."""

from __future__ import annotations

from concurrent.futures import Future
from threading import Thread

from safetensors import SafetensorError

from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip_cli import console
from ffnskip_cli.commands.generate import Options
from ffnskip_cli.commands.generation import kept
from ffnskip_cli.commands.generation.speaker import Speaker
from ffnskip_cli.imports import swift_imports
from ffnskip_cli.sources.locate import Folder, is_current, locate_here

_Found = tuple[Folder, kept.Kept] | None


class Search:
    """Begins when it is made, in a thread that no end of the program waits for.

    Args:
        options: the command line's.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._found: Future[_Found] = Future()
        Thread(target=self._search, daemon=True).start()

    def _search(self) -> None:
        try:
            self._found.set_result(self._find() if kept.allows(self._options) else None)
        except (OSError, FfnskipError):  # a folder that cannot be read, or no cache folder
            self._found.set_result(None)
        except BaseException as error:
            self._found.set_exception(error)

    def _find(self) -> _Found:
        name, asked = self._options.model, self._options.model_options
        path = locate_here(name, asked.revision)
        folder = None if path is None else Folder.seen(path)
        found = None if folder is None else kept.find(folder)
        if folder is None or found is None or found.why_not is not None:
            return None
        return (folder, found) if is_current(folder.path, name, asked.revision, offline=asked.offline) else None

    def speaker(self, text: str) -> Speaker | None:
        """A speaker for a prompt; None where nothing is kept, or it does not do for this prompt or profile."""
        if (found := self._found.result()) is None:
            return None
        with swift_imports():
            from ffnskip_cli.commands.generation.quick import QuickSpeaker

        try:
            with console.busy(f"Loading {self._options.model}, as checked before"):
                return QuickSpeaker(self._options, text, *found)
        except UnsupportedModelError as why_not:
            console.talk.print(f"The model itself is loaded: {why_not}", markup=False, highlight=False)
        except (FfnskipError, OSError, SafetensorError):  # whatever is wrong, loading the model tells in a sentence
            pass
        return None
