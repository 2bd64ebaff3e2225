"""Tokens per second at batch 1, of several ways to decode, side by side in one process.

Machines drift: clocks, caches and neighbours change from minute to minute. So the ways take turns on the same prompt
and the order turns too; what to quote are medians and ratios between rows of one run.

Only decoding is timed, from the first generated token to the last; reading the prompt costs all ways the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ffnskip.decode import decode
from ffnskip.profile import Profile
from ffnskip.stats import SkipStats
from ffnskip.wrap import Applied
from ffnskip_cli.track import Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Way = Callable[[Tensor, int], "Run"]
_REHEARSAL_TOKENS = 8  # past warm-up, so that skipping is rehearsed too


@dataclass(frozen=True)
class Run:
    """One timed decode: when each token came, in seconds, and what was skipped."""

    times: list[float]
    stats: SkipStats | None = None

    @property
    def tokens_per_second(self) -> float:
        """Over the tokens after the first."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


@dataclass
class Speed:
    """The runs of one way to decode."""

    samples: list[float] = field(default_factory=list)
    stats: list[SkipStats] = field(default_factory=list)

    def add(self, run: Run) -> None:
        """Count one more run."""
        self.samples.append(run.tokens_per_second)
        if run.stats is not None:
            self.stats.append(run.stats)

    @property
    def median(self) -> float:
        """Tokens per second, the middle run."""
        return median(self.samples)

    def speedup_over(self, other: Speed) -> float:
        """Median of the ratios to the other way's run on the same prompt, minutes of drift apart from other pairs."""
        return median(mine / theirs for mine, theirs in zip(self.samples, other.samples, strict=True))

    @property
    def total_stats(self) -> SkipStats | None:
        """What was skipped over all runs; None for a way that does not count."""
        if not self.stats:
            return None
        total = SkipStats(self.stats[0].n_layers)
        for stats in self.stats:
            total.add(stats)
        return total


def dense_way(model: PreTrainedModel) -> Way:
    """The runtime's own loop without a profile."""
    return lambda prompt, new_tokens: Run(_times(decode(model, prompt, max_new_tokens=new_tokens)))


def profile_way(model: PreTrainedModel, profile: Profile) -> Way:
    """The same loop with the profile on."""

    def way(prompt: Tensor, new_tokens: int) -> Run:
        with Applied(model, profile, "decode") as applied:
            return Run(_times(decode(model, prompt, max_new_tokens=new_tokens)), applied.stats)

    return way


def hugging_face_way(model: PreTrainedModel) -> Way:
    """What users have without ffnskip: greedy `model.generate`."""

    def way(prompt: Tensor, new_tokens: int) -> Run:
        clock = _Clock()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            eos_token_id=None,
            do_sample=False,
            streamer=clock,
            pad_token_id=0,
        )
        return Run(clock.times)

    return way


def measure_speed(
    ways: Mapping[str, Way], prompts: Tensor, new_tokens: int, repetitions: int, warm_up: int, track: Track
) -> dict[str, Speed]:
    """Time every way `repetitions` times, taking turns.

    Args:
        ways: by row name.
        prompts: ``[n, prompt]``; repetition r uses prompt r (mod n) in every way.
        new_tokens: tokens per run.
        repetitions: runs per way; a short one that is not counted goes first.
        warm_up: the profile's.
        track: shows progress.
    """
    speeds = {name: Speed() for name in ways}
    for way in ways.values():
        way(prompts[:1], warm_up + _REHEARSAL_TOKENS)
    turns = [(r, name) for r in range(repetitions) for name in _turned(list(ways), r)]
    for repetition, name in track(turns, "measuring speed", len(turns)):
        row = repetition % len(prompts)
        speeds[name].add(ways[name](prompts[row : row + 1], new_tokens))
    return speeds


def _turned(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def _times(tokens: Iterable[Tensor]) -> list[float]:
    """When each token was known to the host; asking for its value waits for the device."""
    return [(int(token[0]), time.perf_counter())[1] for token in tokens]


class _Clock(BaseStreamer):
    """A streamer that notes when each generated token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        pass
