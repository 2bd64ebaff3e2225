"""How measurements report progress without knowing where it is shown."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Passes an iterable on and shows how far it has got."""

    def __call__(self, steps: Iterable[T], description: str, total: int) -> Iterable[T]:
        """Yield the `total` items of `steps`."""


def silently(steps: Iterable[T], description: str, total: int) -> Iterable[T]:
    """The Track that shows nothing."""
    return steps
