"""The interface of the fused step, which takes a model one token further: `CpuStep` and `CudaStep` have it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ffnskip.fast.cache import KeyValueCache
from ffnskip.stats import SkipStats

MAX_BATCH = 16  # rows of one step


class FusedStep(Protocol):
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

    def read(self, prompts: Tensor, starts: Tensor) -> Tensor:
        """Run prompts through the model and fill the cache with their keys and values; nothing is skipped.

        Args:
            prompts: ``[batch, prompt]`` int64, padded on the left.
            starts: ``[batch]``, how many padding tokens each has in front.

        Returns:
            Logits of what follows, as those of a step.

        Raises:
            UnsupportedModelError: steps for this device read no prompts.
        """
        ...

    def drain_counts(self, stats: SkipStats) -> None:
        """Move what was counted since the last call to `stats`; waits for the device."""
        ...

    def seconds(self) -> dict[str, float] | None:
        """Time spent so far in attention, ffn, compensation, rule and head; None where that cannot be told apart."""
        ...
