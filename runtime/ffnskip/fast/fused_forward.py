"""A fused step behind a model's own `forward`: whoever calls the model gets it, and need not know.

`model.generate`, pipelines, servers and loops of one's own run a model by calling it. `FusedForward` takes the place of
its `forward`. A step's are the pass that begins sequences, where what follows them is all that is asked for, and passes
over one token of each, on a cache whose every position is known; any other is the model's own. Both leave the same
cache behind (`ffnskip.fast.lent_cache`), so they may follow each other freely.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import is_dataclass
from threading import Lock
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from ffnskip.errors import UnsupportedModelError
from ffnskip.fast.engine import FusedEngine
from ffnskip.fast.forward_pass import given_by_name, over_one_token, over_prompts, padding, why_not_fused
from ffnskip.fast.guard import Pulse, altered, traces
from ffnskip.fast.lent_cache import LentCache, lend, why_not_lent
from ffnskip.fast.products import multiply
from ffnskip.model.forward import fast_products, is_recorded, multiplied_by
from ffnskip.profiles.profile import Profile
from ffnskip.stats import SkipStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PathName = Literal["fused", "general"]


class Counter(Protocol):
    """Knows which tokens may skip, and counts; `Applied` is one."""

    asleep: bool

    @property
    def decoding(self) -> bool:
        """Whether passes may be a step's: the profile is awake, and what is generated skips as decoding does."""
        ...

    def holds_only_prompt(self, length: int) -> bool:
        """Whether a cache's first pass, over so many tokens of each sequence, is nothing but prompt."""
        ...

    def admit(self, tokens: Tensor, cache: LentCache, mask: Tensor | None) -> tuple[Tensor, Tensor, SkipStats]:
        """Of a pass that is a step's: see `Walk.admit`."""
        ...

    def count(self, stats: SkipStats) -> None:
        """Add what the pass has counted."""
        ...


class FusedForward:
    """Stands in the place of a model's `forward`. Also a context manager that gives the model its own back at the end.

    Passes that record gradients, run under autocast, or ask for attentions, hidden states or a loss are the model's
    own, too. Logits of fused passes are float32.

    Args:
        model: the model, before anything else is put on it.
        profile: complete with its weights, or None to run dense.
        only: raise where a fused step cannot run this model, instead of leaving all passes to the model. What is done
            to the model later can only be told by `why_general`.
        check: compare a few steps with the model first.

    Attributes:
        path: `fused` if the latest pass over one token was, or if none has been and a step is ready; else `general`.
        why_general: one sentence on why it is not the fused one; None if it is.
        stands_in: by which a second profile is refused.

    Raises:
        UnsupportedModelError: see `only`.
    """

    stands_in = True

    def __init__(self, model: PreTrainedModel, profile: Profile | None, *, only: bool = False, check: bool = True):
        self._model, self._profile, self._check = model, profile, check
        self._counter: Counter | None = None
        self._engine: FusedEngine | None = None
        self._lock = Lock()
        self._output: Any = None  # the class of the model's own outputs, once one was seen
        self.why_general: str | None = None
        self._had = model.__dict__.get("forward")
        self._own = model.forward
        self.__signature__ = inspect.signature(self._own)  # `generate` looks at what it may pass
        reason = altered(model) or self._read()
        if reason is not None and only:
            raise UnsupportedModelError(reason)
        self.why_general = reason
        self._traces: object = None
        self._pulse = Pulse(model)

    @property
    def path(self) -> PathName:
        """See the class."""
        return "fused" if self.why_general is None else "general"

    def install(self, counter: Counter | None = None) -> FusedForward:
        """Take the place of the model's `forward`, when everything else is in its place, too.

        Args:
            counter: of the profile; None runs dense.
        """
        self._counter = counter
        self._model.forward = self
        self._traces, self._pulse = traces(self._model), Pulse(self._model)
        return self

    def remove(self) -> None:
        """Give the model its own `forward` back, and its matrices row by row. Does nothing the second time."""
        if self._model.__dict__.get("forward") is self:
            del self._model.forward
            if self._had is not None:
                self._model.forward = self._had
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.lay_out_by_row()

    def __enter__(self) -> FusedForward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedForward:
        """Of a copy of the model, which has weights of its own and no step."""
        copy = memo[id(self)] = object.__new__(FusedForward)
        vars(copy).update(vars(self), _engine=None, _had=None, _lock=Lock(), why_general="The model is a copy.")
        copy._model, copy._counter = deepcopy(self._model, memo), deepcopy(self._counter, memo)
        copy._own = MethodType(type(copy._model).forward, copy._model)
        return copy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A pass, with the arguments and the result of the model's own."""
        engine = self._engine
        if engine is None or is_recorded() or not (self._counter is None or self._counter.decoding):
            return self._own(*args, **kwargs)
        given = given_by_name(self.__signature__, args, kwargs)
        begins = over_prompts(given)
        if begins or over_one_token(given):
            engine, reason = self._ready(engine, given)
            if not begins or self._engine is None:
                self.why_general = reason
            if engine is not None and reason is None:
                return self._fused(engine, given["input_ids"], given["past_key_values"])
        if torch.is_grad_enabled():
            return self._own(*args, **kwargs)
        with multiplied_by(multiply), fast_products(self._model):
            output = self._own(*args, **kwargs)
        self._output = type(output)
        return output

    def _fused(self, engine: FusedEngine, tokens: Tensor, cache: LentCache) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        if cache.step.cache.length >= cache.step.cache.capacity:
            cache.step = engine.grown(cache.step.cache)
        step = cache.step
        if step.cache.length == 0:
            starts = step.cache.starts
            if self._counter is not None:
                mask = torch.arange(tokens.shape[1]) >= starts[:, None]
                self._counter.count(self._counter.admit(tokens, cache, mask)[2])
            logits = step.read(tokens, starts)
        elif self._counter is None:
            counted = allowed = torch.zeros(len(tokens), dtype=torch.bool)
            logits = step(tokens[:, 0], counted, counted, allowed)
        else:
            past, may_skip, stats = self._counter.admit(tokens, cache, None)
            counted, allowed = past.flatten().cpu(), may_skip.flatten().cpu()
            logits = step(tokens[:, 0], torch.zeros_like(counted), counted, allowed)
            step.drain_counts(stats)
            self._counter.count(stats)
        kind: Any = self._output if is_dataclass(self._output) else CausalLMOutputWithPast
        return kind(logits=logits[:, None].clone(), past_key_values=cache)

    def _ready(self, engine: FusedEngine, given: dict[str, Any]) -> tuple[FusedEngine | None, str | None]:
        """The engine whose step holds the pass's cache from now on; or why none does, in one sentence."""
        if reason := why_not_fused(given, self._model):
            return None, reason
        cache = given["past_key_values"]
        if isinstance(cache, LentCache):
            interrupted = not cache.get_seq_length()  # while its prompt was read, for which alone it has room
            if interrupted or cache.engine is not engine or self._pulse.changed:  # or made by other weights
                _ = cache.layers  # an ordinary one from here on
        lent, tokens = isinstance(cache, LentCache), given["input_ids"]
        if not lent:
            found, changed = self._looked_at(engine)
            if found is None or changed is not None:
                return None, changed
            engine = found
            if reason := why_not_lent(cache, engine.fused, len(tokens)):
                return None, reason
        length = cache.get_seq_length()
        if length == 0 and not self._may_read(engine, tokens.shape[1]):
            return None, "Prompts go through the model's own forward pass."
        length += tokens.shape[1]
        starts = padding(given, length, len(tokens))
        if starts is None:
            return None, "The attention mask hides more than padding on the left, or the positions do not follow."
        if lent and not torch.equal(cache.step.cache.starts, starts):
            return None, "The attention mask hides other tokens than it did."
        if bool(((tokens < 0) | (tokens >= engine.fused.vocabulary)).any()):
            return None, "There is a token that the model does not have."  # which its own pass says, too
        if reason := engine.why_not(len(tokens), length):
            return None, reason
        return (engine, None) if lent else self._lent(engine, cache, starts, tokens.shape[1])

    def _may_read(self, engine: FusedEngine, length: int) -> bool:
        if self._counter is not None and not self._counter.holds_only_prompt(length):
            return False
        sees_pictures = self._model.config is not self._model.config.get_text_config()
        return engine.reads_prompts(length) and (self._output is not None or not sees_pictures)

    def _lent(
        self, engine: FusedEngine, cache: Any, starts: Tensor, more: int
    ) -> tuple[FusedEngine | None, str | None]:
        try:
            lend(cache, engine, starts, more)
        except (RuntimeError, MemoryError) as error:
            return None, f"There is no room for a fused decode step: {error}"
        return engine, None

    def _looked_at(self, engine: FusedEngine) -> tuple[FusedEngine | None, str | None]:
        """The engine for the model as it is now, looked at as each sequence begins; or why there is none."""
        if traces(self._model) != self._traces:
            return None, "There is a forward hook or a replaced method, which a fused decode step would not run."
        with self._lock:  # threads that come meanwhile wait for the new one
            changed = self._read() if self._engine is engine and engine.stale else None
            self._pulse = Pulse(self._model)
            return self._engine, changed

    def _read(self) -> str | None:
        """Read the model's weights; why they cannot be, in one sentence, or None."""
        self._engine = None  # passes of the check are the model's own
        try:
            engine = FusedEngine(self._model, self._profile)
            if self._check:
                with _asleep(self._counter):
                    self._output = engine.check(self._model)
        except UnsupportedModelError as error:
            return str(error)
        self._engine = engine
        return None


@contextmanager
def _asleep(counter: Counter | None) -> Iterator[None]:
    if counter is None:
        yield
        return
    counter.asleep = True
    try:
        yield
    finally:
        counter.asleep = False
