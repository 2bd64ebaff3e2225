"""A fused step behind a model's own `forward`: whoever calls the model gets it, and need not know.

`model.generate`, pipelines, servers and loops of one's own run a model by calling it. `FusedForward` takes the place of
its `forward`: a pass over one token per sequence, on a cache whose every position is known, is the step's; any other is
the model's own. Both leave the same cache behind (`ffnskip.fast.lent_cache`), so they may follow each other freely.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from ffnskip.errors import UnsupportedModelError
from ffnskip.fast.engine import FusedEngine
from ffnskip.fast.guard import altered, traces
from ffnskip.fast.lent_cache import LentCache, lend, why_not_lent
from ffnskip.model.forward import wide_products
from ffnskip.profiles.profile import Profile
from ffnskip.stats import SkipStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PathName = Literal["fused", "general"]
_UNDERSTOOD = ("input_ids", "past_key_values", "attention_mask", "position_ids", "cache_position", "logits_to_keep")
_TELLING = (Tensor, bool, int, float, str, list, tuple, dict)  # `generate` passes on a tokenizer that it was given


class Counter(Protocol):
    """Knows which tokens may skip, and counts; `Applied` is one."""

    asleep: bool

    def admit(self, tokens: Tensor, cache: LentCache) -> tuple[Tensor, Tensor, SkipStats]:
        """Of a pass over one token of each sequence: see `Walk.admit`."""
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
        only: raise where a fused step cannot run this model, instead of leaving all passes to the model.
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
        self._model, self._profile, self._only, self._check = model, profile, only, check
        self._counter: Counter | None = None
        self._engine: FusedEngine | None = None
        self.why_general: str | None = None
        self._had = model.__dict__.get("forward")
        self._own = model.forward
        self.__signature__ = inspect.signature(self._own)  # `generate` looks at what it may pass
        self._read(altered(model))
        self._traces: object = None

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
        self._traces = traces(self._model)
        return self

    def remove(self) -> None:
        """Give the model its own `forward` back. Does nothing the second time."""
        if self._model.__dict__.get("forward") is self:
            del self._model.forward
            if self._had is not None:
                self._model.forward = self._had
        self._engine = None

    def __enter__(self) -> FusedForward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        model = memo.get(id(self._model), self._model)
        return MethodType(type(model).forward, model)  # a copy of the model has weights of its own, and no step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A pass, with the arguments and the result of the model's own."""
        if self._engine is not None and not torch.is_grad_enabled():
            given = _given(self.__signature__, args, kwargs)
            tokens, cache = given.get("input_ids"), given.get("past_key_values")
            if tokens is not None and cache is not None and tokens.shape[1] == 1:
                self.why_general = _why_not(given, self._model.config) or self._why_not_ready(given, cache)
                if self.why_general is None:
                    return self._fused(tokens, cache)
            with wide_products(self._model):
                return self._own(*args, **kwargs)
        return self._own(*args, **kwargs)

    def _fused(self, tokens: Tensor, cache: LentCache) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        assert self._engine is not None
        if cache.step.cache.length >= cache.step.cache.capacity:
            cache.step = self._engine.grown(cache.step.cache)
        step = cache.step
        if self._counter is None:
            counted = allowed = torch.zeros(len(tokens), dtype=torch.bool)
            logits = step(tokens[:, 0], counted, counted, allowed)
        else:
            past, may_skip, stats = self._counter.admit(tokens, cache)
            counted, allowed = past.flatten().cpu(), may_skip.flatten().cpu()
            logits = step(tokens[:, 0], torch.zeros_like(counted), counted, allowed)
            step.drain_counts(stats)
            self._counter.count(stats)
        return CausalLMOutputWithPast(logits=logits[:, None].clone(), past_key_values=cache)

    def _why_not_ready(self, given: dict[str, Any], cache: Any) -> str | None:
        """Why a step cannot go on with the cache; None when it can, and then it holds it."""
        if isinstance(cache, LentCache) and cache.engine is not self._engine:
            _ = cache.layers  # another model's, or made before the weights changed: an ordinary one from here on
        lent, batch = isinstance(cache, LentCache), len(given["input_ids"])
        if not lent and (reason := self._why_altered()):
            return reason
        assert self._engine is not None
        if not lent and (reason := why_not_lent(cache, self._engine.fused, batch)):
            return reason
        length = cache.get_seq_length()
        starts = _starts(given, length, batch)
        if starts is None:
            return "The attention mask hides more than padding on the left, or the positions do not follow from it."
        if lent and not torch.equal(cache.step.cache.starts, starts):
            return "The attention mask hides other tokens than it did."
        if (reason := self._engine.why_not(batch, length + 1)) is None and not lent:
            lend(cache, self._engine, starts)
        return reason

    def _why_altered(self) -> str | None:
        """Look at the model as each sequence begins."""
        if traces(self._model) != self._traces:
            return "There is a forward hook, or a replaced forward method, which a fused decode step would not run."
        assert self._engine is not None
        if self._engine.stale:
            self._read(None)
        return None if self._engine is not None else self.why_general

    def _read(self, reason: str | None) -> None:
        """Read the model's weights, unless there is a reason not to."""
        self._engine = None
        try:
            if reason is not None:
                raise UnsupportedModelError(reason)
            engine = FusedEngine(self._model, self._profile)
            if self._check:
                with _asleep(self._counter):
                    engine.check()
            self._engine = engine
        except UnsupportedModelError as error:
            if self._only:
                raise
            self.why_general = str(error)


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


def _given(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a pass by name."""
    given: dict[str, Any] = dict(signature.bind_partial(*args, **kwargs).arguments) if args else dict(kwargs)
    given.update(given.pop("kwargs", {}))
    return given


def _why_not(given: dict[str, Any], config: Any) -> str | None:
    """Why a pass over one token per sequence is more than a step computes, in one sentence; None if it is not."""
    if given.get("use_cache") is False or given.get("return_dict") is False:
        return "The pass is to keep no cache, or to return a tuple, which a fused decode step does not."
    others = [name for name in given if name not in (*_UNDERSTOOD, "use_cache", "return_dict")]
    others = [name for name in others if given[name] is not False and isinstance(given[name], _TELLING)]
    others += [name for name in ("output_attentions", "output_hidden_states") if getattr(config, name, False)]
    if others:
        return f"The pass is given {others[0]}, which a fused decode step does not know."
    if torch.is_autocast_enabled(given["input_ids"].device.type):
        return "A fused decode step does not run under autocast."
    return None


def _starts(given: dict[str, Any], length: int, batch: int) -> Tensor | None:
    """How many padding tokens each sequence has in front, ``[batch]``; None if a pass sees or places tokens otherwise.

    Args:
        given: the pass's arguments.
        length: of the cache, padding included.
        batch: how many sequences there are.
    """
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    starts = torch.zeros(batch, dtype=torch.int64, device=given["input_ids"].device)
    if mask is not None:
        if mask.shape != (batch, length + 1):
            return None
        real = mask.bool()
        starts = (~real).sum(-1)
        if not bool(torch.eq(real.long().argmax(-1), starts).all()):  # the first real token, behind all that are not
            return None
    expected = length if mask is None else length - starts
    if positions is not None:
        return starts if positions.dim() == 2 and bool((positions[:, -1] == expected).all()) else None
    return starts if mask is None or not bool(starts.any()) else None
