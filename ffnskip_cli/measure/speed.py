"""Tokens per second at batch 1, of several ways to decode, side by side in one process.

Machines drift: clocks, caches and neighbours change from minute to minute. So the ways take turns on the same prompt
and the order turns too; what to quote are medians and ratios between rows of one run.

A way decodes along a text, whose tokens are fed one by one whatever it would choose (teacher forcing), or it writes its
own continuation of the prompt. The two are different clocks: greedy continuations repeat themselves, and where they do
a profile skips several times as much as along text.

Tokens per second are those past the profile's warm-up, in which it runs dense; the time to the first token, which is
that of reading the prompt, is taken apart.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from ffnskip.decoder import Decoder
from ffnskip.stats import SkipStats
from ffnskip_cli.progress import Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Way = Callable[[Tensor, int, Tensor | None], "Run"]
"""From a prompt ``[1, prompt]``, the number of new tokens, and those to feed ``[1, new tokens]``, or None."""
_REHEARSAL_TOKENS = 8  # past warm-up, so that skipping is rehearsed too


@dataclass(frozen=True)
class Run:
    """One timed decode.

    Attributes:
        times: when the token before the first timed one came, and then each timed one, in seconds.
        first_token: seconds that the prompt and the first token behind it took.
        seconds: what the whole decode took.
        stats: what was skipped; None for a way that does not count.
        parts: seconds that each part of a step took, over all timed tokens; None where that is not known.
    """

    times: list[float]
    first_token: float
    seconds: float
    stats: SkipStats | None = None
    parts: dict[str, float] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Over the timed tokens."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])

    @property
    def breakdown(self) -> dict[str, float] | None:
        """Milliseconds per token of each part; `other` is what is left of the time that passed."""
        if self.parts is None:
            return None
        steps, passed = len(self.times) - 1, self.times[-1] - self.times[0]
        parts = self.parts | {"other": passed - sum(self.parts.values())}
        return {name: 1000 * seconds / steps for name, seconds in parts.items()}


@dataclass
class Speed:
    """The runs of one way to decode."""

    samples: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    prompt_shares: list[float] = field(default_factory=list)
    stats: list[SkipStats] = field(default_factory=list)
    breakdowns: list[dict[str, float]] = field(default_factory=list)

    def add(self, run: Run) -> None:
        """Count one more run."""
        self.samples.append(run.tokens_per_second)
        self.first_tokens.append(run.first_token)
        self.prompt_shares.append(run.first_token / run.seconds)
        if run.stats is not None:
            self.stats.append(run.stats)
        if run.breakdown is not None:
            self.breakdowns.append(run.breakdown)

    @property
    def breakdown(self) -> dict[str, float] | None:
        """Milliseconds per token of each part, the middle of the runs; None where that is not known."""
        if not self.breakdowns:
            return None
        return {name: median(run[name] for run in self.breakdowns) for name in self.breakdowns[0]}

    @property
    def median(self) -> float:
        """Tokens per second, the middle run."""
        return median(self.samples)

    def speedup_over(self, other: Speed) -> float:
        """Median of the ratios to the other way's run on the same prompt, minutes of drift apart from other pairs."""
        return median(pair_ratios(self.samples, other.samples))

    @property
    def total_stats(self) -> SkipStats | None:
        """What was skipped over all runs; None for a way that does not count."""
        if not self.stats:
            return None
        total = SkipStats(self.stats[0].n_layers)
        for stats in self.stats:
            total.add(stats)
        return total


def pair_ratios(samples: Sequence[float], others: Sequence[float]) -> list[float]:
    """Of the runs of two ways on the same prompts, pair by pair."""
    return [mine / theirs for mine, theirs in zip(samples, others, strict=True)]


def decoder_way(decoder: Decoder, warm_up: int = 0) -> Way:
    """The runtime's own loop, with the decoder's profile or without one, timed from step `warm_up` on."""

    def way(prompt: Tensor, new_tokens: int, forced: Tensor | None = None) -> Run:
        decoder.reset_stats()
        start = time.perf_counter()
        tokens = decoder.decode(prompt, max_new_tokens=new_tokens, forced=forced)
        untimed = _times(itertools.islice(tokens, warm_up + 1))  # the first of them comes from the prompt
        before = decoder.seconds()
        times = [untimed[-1], *_times(tokens)]
        after = decoder.seconds()
        parts = {name: after[name] - before[name] for name in after} if before and after else None
        return Run(
            times, untimed[0] - start, times[-1] - start, None if decoder.profile is None else decoder.stats, parts
        )

    return way


def hugging_face_way(model: PreTrainedModel, warm_up: int = 0) -> Way:
    """What users have without ffnskip: greedy `model.generate`; along a text by a logits processor that forces it."""

    def way(prompt: Tensor, new_tokens: int, forced: Tensor | None = None) -> Run:
        clock, start = _Clock(), time.perf_counter()
        along = [] if forced is None else [_Forced(forced.to(prompt.device), prompt.shape[1])]
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            eos_token_id=None,
            do_sample=False,
            streamer=clock,
            pad_token_id=0,
            logits_processor=LogitsProcessorList(along),
        )
        return Run(clock.times[warm_up:], clock.times[0] - start, clock.times[-1] - start)

    return way


def measure_speed(
    ways: Mapping[str, Way],
    prompts: Tensor,
    new_tokens: int,
    repetitions: int,
    warm_up: int,
    track: Track,
    forced: Tensor | None = None,
) -> dict[str, Speed]:
    """Time every way `repetitions` times, taking turns.

    Args:
        ways: by row name.
        prompts: ``[n, prompt]``; repetition r uses prompt r (mod n) in every way.
        new_tokens: tokens per run.
        repetitions: runs per way; a short one that is not counted goes first.
        warm_up: the profile's.
        track: shows progress.
        forced: ``[n, new_tokens]``, the text that follows the prompts, to decode along; None to let the model write.
    """
    speeds = {name: Speed() for name in ways}
    for way in ways.values():
        way(prompts[:1], warm_up + _REHEARSAL_TOKENS, None)
    turns = [(r, name) for r in range(repetitions) for name in _turned(list(ways), r)]
    for repetition, name in track(turns, "measuring speed", len(turns)):
        row = slice(repetition % len(prompts), repetition % len(prompts) + 1)
        speeds[name].add(ways[name](prompts[row], new_tokens, None if forced is None else forced[row]))
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


class _Forced(LogitsProcessor):
    """Makes ``tokens [1, n]`` the likeliest ones, one after the other behind a prompt; it writes one number a step."""

    def __init__(self, tokens: Tensor, prompt: int) -> None:
        self._tokens = tokens
        self._prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter_(1, self._tokens[:, input_ids.shape[1] - self._prompt, None], float("inf"))
