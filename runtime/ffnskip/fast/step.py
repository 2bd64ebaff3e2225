"""What every fused decode step is: the same on a CPU and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ffnskip.fast.cache import KeyValueCache

MAX_BATCH = 16  # rows of one step


@dataclass(frozen=True)
class Counts:
    """What a step skipped since it was built: numbers of tokens, per layer as in `ffnskip.SkipStats`."""

    skipped: list[int]
    checked: list[int]
    first_skipped: list[int]
    never_skipped: int


class Step(Protocol):
    """Takes every row of a batch one token further. Built for one batch size, one cache and one profile."""

    cache: KeyValueCache

    def __call__(self, tokens: Tensor, ended: Tensor, counted: Tensor, allowed: Tensor) -> Tensor:
        """Run one token per row through the model and write its key and value into the cache.

        Args:
            tokens: ``[batch]`` int64.
            ended: ``[batch]`` bool, rows whose logits no longer matter, and need not be computed.
            counted: ``[batch]`` bool, which rows count in the statistics: those past warm-up that have not ended.
            allowed: ``[batch]`` bool, which of these may skip.

        Returns:
            Logits ``[batch, vocabulary]`` float32, in a buffer that the next call writes over.
        """
        ...

    def counts(self) -> Counts:
        """What was skipped so far; waits for the device."""
        ...

    def reset_counts(self) -> None:
        """Start counting anew."""
        ...

    def seconds(self) -> dict[str, float] | None:
        """Time spent so far in attention, ffn, compensation, rule and head; None where that cannot be told apart."""
        ...
