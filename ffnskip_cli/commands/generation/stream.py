"""Print an answer as its tokens come."""

from __future__ import annotations

from collections.abc import Callable


class Stream:
    """Is shown an answer token by token, and writes whole characters as soon as they are there.

    What a token adds is what the text of a few tokens grows by: alone it might lose its space, or be half a character.

    Args:
        text: turns tokens into text.
        write: takes the text.
    """

    def __init__(self, text: Callable[[list[int]], str], write: Callable[[str], object]) -> None:
        self._text, self._write = text, write
        self._tokens: list[int] = []
        self._begin = self._written = 0  # what is looked at, and what of it was written; both end whole characters

    def __call__(self, token: int) -> None:
        """Show the next token."""
        self._tokens.append(token)
        new = self._new()
        if new and not new.endswith("\N{REPLACEMENT CHARACTER}"):
            self._write(new)
            self._begin, self._written = self._written, len(self._tokens)

    def end(self) -> None:
        """Write what is left, which may be half a character, and end the line."""
        self._write(self._new() + "\n")

    def _new(self) -> str:
        before = self._text(self._tokens[self._begin : self._written])
        return self._text(self._tokens[self._begin :])[len(before) :]
