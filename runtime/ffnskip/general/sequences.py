"""Where in its sequence a forward pass is: how many tokens were generated before each of its own.

A model's forward pass does not say which of its tokens are prompt. Three things tell:

- `model.generate` is given the prompt, so all behind it is generated, whichever passes it comes in: a prompt in chunks,
  candidates of speculative decoding that may be rejected, whole sequences where there is no cache.
- In any other loop, the passes over one cache are one sequence (or one batch of them). The prompt is what comes before
  its first pass over a single token, and again each later pass over several tokens, which is another turn. A pass
  without a cache belongs to the sequence that it makes longer by one token.
- In continuous batching one pass holds pieces of many sequences. A sequence is known by the place in the cache where
  its previous token lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from threading import local
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


@dataclass
class _Sequence:
    """What was seen of a cache: the length of the prompt, the next position, and whether tokens are generated."""

    prompt: int
    end: int
    generating: bool = False


@dataclass
class _Call:
    """A call of `model.generate`, with its prompt's length, padding included, and the cache that it fills."""

    prompt: int
    cache: object = None


class Sequences(local):
    """Follows the sequences of one model. Calls and passes are a thread's own.

    Args:
        known: of each cache, its sequence; shared by all threads, as another one may go on with a cache.
    """

    def __init__(self, known: WeakKeyDictionary[Any, _Sequence]) -> None:
        self._known = known
        self._calls: list[_Call] = []
        self._slots: dict[int, int] = {}  # of continuous batching: place of a sequence's latest token -> its prompt
        self._uncached: tuple[Tensor, int] | None = None  # the latest tokens without a cache, and their prompt's length
        self._latest: _Sequence | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Sequences, (WeakKeyDictionary(),)  # a copy of the model has sequences of its own

    @contextmanager
    def generating(self, prompt: int) -> Iterator[None]:
        """While inside, `model.generate` continues prompts of this length, padding included."""
        self._calls.append(_Call(prompt))
        try:
            yield
        finally:
            self._calls.pop()

    def index(self, tokens: Tensor, cache: Any, packed: dict[str, Any]) -> Tensor | None:
        """How many generated tokens came before each of a pass's.

        Args:
            tokens: ``[batch, sequence]`` ids, or ``[batch, sequence, hidden]`` embeddings.
            cache: the key-value cache as it is before the pass, or None.
            packed: what the pass is told beside that; continuous batching says where the sequences lie.

        Returns:
            ``[batch, sequence]`` integers, negative in a prompt; None where there is nothing but prompt.
        """
        if "write_index" in packed and "cu_seq_lens_q" in packed:
            return self._packed(tokens, packed)
        batch, length = tokens.shape[:2]
        cache = cache if hasattr(cache, "get_seq_length") else None
        known = None if cache is None else self._known.get(cache)
        start = _length(cache, 0 if known is None else known.end)
        prompt, of_call = (self._grown_from(tokens) if cache is None else None), False
        if prompt is None:
            prompt = self._prompt_of_call(cache, start, length)
            of_call = prompt is not None
        if prompt is not None:
            self._latest = _Sequence(prompt, start + length, generating=start + length > prompt)
        else:
            self._latest = _next(known, start, length)
        if cache is None and not of_call:  # of which a later pass may show the next token
            self._uncached = tokens, self._latest.prompt
        if cache is not None:
            self._known[cache] = self._latest
        if self._latest.end <= self._latest.prompt:
            return None
        return (torch.arange(length, device=tokens.device) + start - self._latest.prompt).expand(batch, length)

    def holds_only_prompt(self, length: int) -> bool:
        """Whether a cache's first pass, over so many tokens of each sequence, is nothing but prompt."""
        return not self._calls or length <= self._calls[-1].prompt

    def made(self, cache: object) -> None:
        """The latest pass, which was given no cache, has made one."""
        if self._latest is not None and hasattr(cache, "get_seq_length") and cache not in self._known:
            self._known[cache] = self._latest
            if self._calls and self._calls[-1].cache is None:
                self._calls[-1].cache = cache

    def _prompt_of_call(self, cache: object, start: int, length: int) -> int | None:
        """The length of the prompt, if the pass is one of `generate` over its own sequences."""
        if not self._calls:
            return None
        call = self._calls[-1]
        if call.cache is None and cache is not None and start < call.prompt:
            call.cache = cache
        if call.cache is not cache or (cache is None and length < call.prompt):
            return None  # guidance runs another prompt through the model meanwhile
        return call.prompt

    def _grown_from(self, tokens: Tensor) -> int | None:
        """The length of the prompt, if the pass shows the latest text without a cache and one more token."""
        if self._uncached is None:
            return None
        before, prompt = self._uncached
        same = before.shape[0] == tokens.shape[0] and before.shape[1] == tokens.shape[1] - 1
        return prompt if same and torch.equal(before, tokens[:, :-1]) else None

    def _packed(self, tokens: Tensor, packed: dict[str, Any]) -> Tensor:
        """Of continuous batching: ``[1, sequence]``."""
        position, written = packed["position_ids"][0].tolist(), packed["write_index"][0].tolist()
        read = packed["read_index"][0].tolist()
        bounds = packed["cu_seq_lens_q"].tolist()
        keys = packed["cu_seq_lens_k"]
        key_bounds = (next(iter(keys.values())) if isinstance(keys, dict) else keys).tolist()
        index = [-1] * tokens.shape[1]
        for number, (first, last) in enumerate(pairwise(bounds)):
            if first == last:
                continue
            start, length = position[first], last - first
            before = key_bounds[number + 1] - length - 1  # the place, among those read, of the token before
            previous = read[before] if start > 0 and before < len(read) else None
            prompt = self._slots.pop(previous, None) if previous is not None else None
            if start == 0 or length > 1:
                prompt = None
            elif prompt is None:
                prompt = start
            if prompt is not None:
                index[first] = start - prompt
                self._slots[written[last - 1]] = prompt
        return torch.tensor([index], device=tokens.device)


def _length(cache: Any, otherwise: int) -> int:
    """How many tokens a cache holds."""
    try:
        return 0 if cache is None else int(cache.get_seq_length())
    except (AttributeError, ValueError, NotImplementedError):  # a cache without attention, or of a kind of its own
        return otherwise


def _next(known: _Sequence | None, start: int, length: int) -> _Sequence:
    """The sequence after a pass of this length that begins at `start`."""
    end = start + length
    if start == 0 or length > 1:
        return _Sequence(end, end)
    if known is None or not known.generating or known.prompt > start:
        return _Sequence(start, end, generating=True)
    return _Sequence(known.prompt, end, generating=True)
