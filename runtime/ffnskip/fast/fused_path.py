"""The fused path: the model's own forward pass reads the prompt, and a fused step generates each token.

`FusedEngine` holds what outlives a decode (the fused model, the profile, the step and its cache); a `FusedPath` is one
decode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.fast.cache import KeyValueCache
from ffnskip.fast.families import fuse
from ffnskip.fast.fused_model import FusedModel
from ffnskip.fast.guard import Weights, altered
from ffnskip.fast.parts import leaves_out_parts, refuse_parts
from ffnskip.fast.skipping import FusedSkip, fuse_profile
from ffnskip.fast.step import MAX_BATCH, FusedStep
from ffnskip.model.forward import forward
from ffnskip.profiles.profile import Profile
from ffnskip.rules import may_skip
from ffnskip.stats import SkipStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHECKED = (5, 4)  # tokens that the check reads as a prompt, and steps that follow
# Relative error of the logits. The model itself rounds to bfloat16 behind every operation, a fused step does not; what
# is read wrongly is off by about 1.
_ROUNDED = 0.1
_TOLERANCE = {torch.float32: 1e-3}
_ROOM = 512  # slots that a cache has at least for new tokens; it grows by doubling when they are full


class FusedEngine:
    """A fused model and profile, with the step that decodes by them.

    Args:
        model: the model; see `fuse` for what becomes of it.
        profile: complete with its weights, or None to run dense.
        stats: what is skipped is added to these; see `drain_counts`.

    Attributes:
        step: the step, on a cache that the latest decode fills.
        current: the latest decode, which alone can go on; None before the first.

    Raises:
        UnsupportedModelError: there is no fused step for this model, or none that runs here.
    """

    def __init__(self, model: PreTrainedModel, profile: Profile | None, stats: SkipStats) -> None:
        self.model = model
        self.profile = profile
        self.stats = stats
        if reason := altered(model):
            raise UnsupportedModelError(reason)
        _refuse_without_compiler(model)
        by_input = leaves_out_parts(profile)
        if by_input:
            refuse_parts(model)
        self._fused = fuse(model, by_input=by_input)
        self._weights = Weights(model)
        self._skip = None if profile is None else fuse_profile(profile, self._fused.intermediate, self._fused.device)
        self.step: FusedStep | None = None
        self._earlier_seconds: dict[str, float] = {}  # of steps that were replaced
        self.current: FusedPath | None = None
        self.reserve(1, 1)  # fails here and not in the middle of a decode where no step can be built

    @property
    def stale(self) -> bool:
        """Whether the model's weights have changed since they were read."""
        return self._weights.changed

    def why_not(self, prompts: Tensor, max_new_tokens: int) -> str | None:
        """Why it cannot decode these, in one sentence; None if it can."""
        batch, length = prompts.shape
        if batch > MAX_BATCH:
            return f"The fused decode step takes at most {MAX_BATCH} sequences at once, not {batch}."
        if length + max_new_tokens > self._fused.max_length:
            return (
                f"The fused decode step takes at most {self._fused.max_length} positions, as the model does, and "
                f"{length} + {max_new_tokens} are more."
            )
        return altered(self.model)

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

    @torch.inference_mode(False)  # or what is built here could not be written outside of a decode
    def reserve(self, batch: int, capacity: int) -> None:
        """Have a step for so many sequences of so many tokens: the latest one, if it will do."""
        if self.step is not None:
            cache = self.step.cache
            if cache.batch == batch and cache.capacity >= capacity:
                return
            self.drain_counts()
            self._earlier_seconds = self.seconds() or {}
            self.step = None  # frees its cache before another is allocated
        roomy = min(-(-capacity // _ROOM) * _ROOM, self._fused.max_length)
        self.step = build_step(self._fused, self._allocate(batch, roomy), self._skip)

    @torch.inference_mode(False)
    def make_room(self) -> None:
        """Double the latest step's cache if it is full."""
        assert self.step is not None
        cache = self.step.cache
        if cache.length < cache.capacity:
            return
        self.drain_counts()
        self._earlier_seconds = self.seconds() or {}
        self.step = None
        self.step = build_step(self._fused, cache.grown(min(2 * cache.capacity, self._fused.max_length)), self._skip)

    def _allocate(self, batch: int, capacity: int) -> KeyValueCache:
        """A cache in the model's precision, or in float32 where a step does not read that (a packed float16 model)."""
        dtype = self.model.dtype if self.model.dtype in (torch.float32, torch.bfloat16) else torch.float32
        return KeyValueCache.allocate(self._fused, batch, capacity, dtype)

    def check(self) -> None:
        """Compare a few dense steps with the model's own forward pass.

        Raises:
            UnsupportedModelError: they differ by more than rounding.
        """
        n_prompt, n_steps = _CHECKED
        tokens = torch.arange(n_prompt + n_steps, device=self._fused.device)[None] * 7919 % self._fused.vocabulary
        no = torch.zeros(1, dtype=torch.bool)
        with torch.inference_mode():
            expected = forward(self.model, tokens, use_cache=False).logits[:, n_prompt:].float()
            step = build_step(self._fused, self._allocate(1, n_prompt + n_steps), None)
            _prefill(self.model, tokens[:, :n_prompt], None, step.cache)
            logits = torch.stack([step(tokens[:, n_prompt + i], no, no, no).clone() for i in range(n_steps)], dim=1)
        error = float((logits - expected).norm() / expected.norm())
        if not error <= _TOLERANCE.get(self.model.dtype, _ROUNDED):
            raise UnsupportedModelError(
                f"The fused decode step gives other logits than the model (relative error {error:.2g}): it is not used."
            )


class FusedPath:
    """One decode by an engine, see `ffnskip.decode.DecodePath`."""

    def __init__(self, engine: FusedEngine, max_new_tokens: int) -> None:
        self._engine = engine
        self._max_new_tokens = max_new_tokens
        self._index = 0  # tokens generated so far
        skip = None if engine.profile is None else engine.profile.skip
        self._may_skip = None if skip is None else may_skip(torch.arange(max_new_tokens), skip)
        self._none = torch.empty(0, dtype=torch.bool)

    def prefill(self, prompts: Tensor, mask: Tensor | None) -> Tensor:
        """See `DecodePath`."""
        batch, length = prompts.shape
        self._engine.reserve(batch, length + min(self._max_new_tokens, _ROOM))
        self._engine.current = self
        self._none = torch.zeros(batch, dtype=torch.bool)
        assert self._engine.step is not None
        return _prefill(self._engine.model, prompts, mask, self._engine.step.cache)

    def step(self, tokens: Tensor, ended: Tensor) -> Tensor:
        """See `DecodePath`."""
        if self._engine.current is not self:
            raise FfnskipError("Another decode was started with this decoder: finish one before the next.")
        assert self._engine.step is not None
        self._engine.make_room()
        counted, allowed = self._count(ended)
        self._index += 1
        return self._engine.step(tokens, ended, counted, allowed)

    def _count(self, ended: Tensor) -> tuple[Tensor, Tensor]:
        """Count the rows that go on; which of them count as past their warm-up, and which of these may skip.

        It runs once a token between two steps that have emptied the caches, so it takes few operations.
        """
        profile, stats = self._engine.profile, self._engine.stats
        if profile is None or self._may_skip is None:
            return self._none, self._none
        running = ~ended
        if self._index < profile.skip.warm_up:
            stats.warm_up_tokens += int(running.sum())
            return self._none, self._none
        stats.tokens += int(running.sum())
        return running, running if bool(self._may_skip[self._index]) else self._none


def _refuse_without_compiler(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError on a CPU where no step can be compiled, before anything of the model is moved."""
    if model.device.type == "cpu":
        from ffnskip.fast.build import step_library

        step_library()


def _prefill(model: PreTrainedModel, prompts: Tensor, mask: Tensor | None, cache: KeyValueCache) -> Tensor:
    """Fill the cache by the model's own forward pass; logits ``[batch, vocabulary]`` of what follows."""
    from transformers import DynamicCache

    real = torch.ones_like(prompts) if mask is None else mask
    past = DynamicCache()  # without the model's configuration it keeps every position, whatever the window
    logits: Tensor = forward(
        model,
        prompts,
        attention_mask=mask,
        position_ids=(real.cumsum(-1) - 1).clamp(min=0),
        past_key_values=past,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    cache.fill(past, (real == 0).sum(-1))
    return logits[:, -1]


def build_step(model: FusedModel, cache: KeyValueCache, skip: FusedSkip | None) -> FusedStep:
    """The step for the device that the model is on.

    Raises:
        UnsupportedModelError: there is none for it, or what it is built with is missing.
    """
    if model.device.type == "cpu":
        from ffnskip.fast.cpu_step import CpuStep

        return CpuStep(model, cache, skip)
    if model.device.type == "cuda":
        from ffnskip.fast.cuda.cuda_step import CudaStep

        return CudaStep(model, cache, skip)
    raise UnsupportedModelError(f"On {model.device.type} there is no fused decode step.")
