"""The fused path of `ffnskip.Decoder`: a fused step makes each token, and on most CPUs reads the prompt.

`FusedDecodes` holds what outlives a decode (the engine, and the latest step with its cache); a `FusedPath` is one
decode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ffnskip.errors import FfnskipError
from ffnskip.fast.engine import ROOM, Steps
from ffnskip.fast.step import FusedStep
from ffnskip.rules import may_skip
from ffnskip.stats import SkipStats


class FusedDecodes:
    """The decodes of one decoder, one after the other, by steps that they share.

    Args:
        engine: builds the steps.
        stats: what is skipped is added to these; see `drain_counts`.

    Attributes:
        engine: see above.
        step: the latest, on a cache that the latest decode fills.
        current: the latest decode, which alone can go on; None before the first.

    Raises:
        UnsupportedModelError: no step can be built.
    """

    def __init__(self, engine: Steps, stats: SkipStats) -> None:
        self.engine = engine
        self.stats = stats
        self.step: FusedStep | None = None
        self._earlier_seconds: dict[str, float] = {}  # of steps that were replaced
        self.current: FusedPath | None = None
        self.reserve(1, 1)  # fails here and not in the middle of a decode where no step can be built

    def path(self, max_new_tokens: int) -> FusedPath:
        """A path for one decode, of which only the latest can go on: they share the key-value cache."""
        return FusedPath(self, max_new_tokens)

    def drain_counts(self) -> None:
        """Bring `stats` up to date with the step."""
        if self.step is not None:
            self.step.drain_counts(self.stats)

    def seconds(self) -> dict[str, float] | None:
        """See `FusedStep`; of all decodes so far."""
        seconds = None if self.step is None else self.step.seconds()
        return seconds and {part: spent + self._earlier_seconds.get(part, 0.0) for part, spent in seconds.items()}

    def reserve(self, batch: int, capacity: int) -> None:
        """Have a step for so many sequences of so many tokens: the latest one, if it will do."""
        if self.step is not None:
            cache = self.step.cache
            if cache.batch == batch and cache.capacity >= capacity:
                return
            self._let_go()  # frees its cache before another is allocated
        self.step = self.engine.step(batch, capacity)

    def make_room(self) -> None:
        """Double the latest step's cache if it is full."""
        assert self.step is not None
        cache = self.step.cache
        if cache.length >= cache.capacity:
            self._let_go()
            self.step = self.engine.grown(cache)

    def _let_go(self) -> None:
        self.drain_counts()
        self._earlier_seconds = self.seconds() or {}
        self.step = None


class FusedPath:
    """One decode, see `ffnskip.decode.DecodePath`."""

    def __init__(self, decodes: FusedDecodes, max_new_tokens: int) -> None:
        self._decodes = decodes
        self._max_new_tokens = max_new_tokens
        self._index = 0  # tokens generated so far
        skip = None if decodes.engine.profile is None else decodes.engine.profile.skip
        self._may_skip = None if skip is None else may_skip(torch.arange(max_new_tokens), skip)
        self._none = torch.empty(0, dtype=torch.bool)

    def prefill(self, prompts: Tensor, mask: Tensor | None) -> Tensor:
        """See `DecodePath`."""
        batch, length = prompts.shape
        self._decodes.reserve(batch, length + min(self._max_new_tokens, ROOM))
        self._decodes.current = self
        self._none = torch.zeros(batch, dtype=torch.bool)
        assert self._decodes.step is not None
        return self._decodes.engine.prefill(prompts, mask, self._decodes.step)

    def step(self, tokens: Tensor, ended: Tensor) -> Tensor:
        """See `DecodePath`."""
        if self._decodes.current is not self:
            raise FfnskipError("Another decode was started with this decoder: finish one before the next.")
        assert self._decodes.step is not None
        self._decodes.make_room()
        counted, allowed = self._count(ended)
        self._index += 1
        return self._decodes.step(tokens, ended, counted, allowed)

    def _count(self, ended: Tensor) -> tuple[Tensor, Tensor]:
        """Count the rows that go on; which of them count as past their warm-up, and which of these may skip.

        It runs once a token between two steps that have emptied the caches, so it takes few operations.
        """
        profile, stats = self._decodes.engine.profile, self._decodes.stats
        if profile is None or self._may_skip is None:
            return self._none, self._none
        running = ~ended
        if self._index < profile.skip.warm_up:
            stats.warm_up_tokens += int(running.sum())
            return self._none, self._none
        stats.tokens += int(running.sum())
        return running, running if bool(self._may_skip[self._index]) else self._none
