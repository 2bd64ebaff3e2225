"""The fused path of a decode: the model's own forward pass reads the prompt, a fused step does the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.decode import Path
from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.fast.cache import KeyValueCache
from ffnskip.fast.families import fuse
from ffnskip.fast.fused_model import FusedModel
from ffnskip.fast.skipping import FusedSkip, fuse_profile
from ffnskip.fast.step import MAX_BATCH, Step
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
_ROOM = 512  # slots that a cache grows by, so that a longer decode seldom needs another one


class FusedPath:
    """One fused model and profile, for one decode after the other.

    Args:
        model: the model; see `fuse` for what becomes of it.
        profile: complete with its weights, or None to run dense.

    Raises:
        UnsupportedModelError: there is no fused step for this model, or none that runs here.
    """

    def __init__(self, model: PreTrainedModel, profile: Profile | None) -> None:
        self._model = model
        _refuse_without_compiler(model)
        self._fused = fuse(model)
        self._profile = profile
        self._skip = None if profile is None else fuse_profile(profile, self._fused.intermediate, self._fused.device)
        self._step: Step | None = None
        self._seconds: dict[str, float] = {}  # of steps that were replaced
        self.turn: _Turn | None = None
        self._tokens = self._warm_up_tokens = self._index = 0
        self._earlier = SkipStats(len(self._fused.layers))
        self.reserve(1, 1)  # fails here and not in the middle of a decode where no step can be built

    def takes(self, prompts: Tensor, mask: Tensor | None, max_new_tokens: int) -> bool:
        """Whether it can decode these: not too many at once, not too long, and padded on the left alone."""
        batch, length = prompts.shape
        padded_left = mask is None or bool((mask[:, 1:] >= mask[:, :-1]).all())
        return batch <= MAX_BATCH and length + max_new_tokens <= self._fused.max_length and padded_left

    def begin(self, max_new_tokens: int) -> Path:
        """A path for one decode, of which only the latest can go on: they share the key-value cache."""
        return _Turn(self, max_new_tokens)

    @property
    def stats(self) -> SkipStats:
        """What was skipped since the last reset."""
        assert self._step is not None
        counts = self._step.counts()
        current = SkipStats(
            len(self._fused.layers),
            self._tokens,
            self._warm_up_tokens,
            counts.never_skipped,
            counts.skipped,
            counts.checked,
            counts.first_skipped,
        )
        total = SkipStats(len(self._fused.layers))
        total.add(self._earlier)
        total.add(current)
        return total

    def reset_stats(self) -> None:
        """Start counting anew."""
        assert self._step is not None
        self._step.reset_counts()
        self._earlier = SkipStats(len(self._fused.layers))
        self._tokens = self._warm_up_tokens = 0

    def seconds(self) -> dict[str, float] | None:
        """See `Step`; of all decodes so far."""
        assert self._step is not None
        now = self._step.seconds()
        return now and {part: spent + self._seconds.get(part, 0.0) for part, spent in now.items()}

    def read(self, prompts: Tensor, mask: Tensor | None) -> Tensor:
        """See `ffnskip.decode.Path`."""
        assert self._step is not None
        logits = _read_prompts(self._model, prompts, mask, self._step.cache)
        self._index = 0
        return logits

    def step(self, tokens: Tensor, ended: Tensor) -> Tensor:
        """See `ffnskip.decode.Path`."""
        assert self._step is not None
        counted, allowed = self._rights(~ended)
        self._index += 1
        return self._step(tokens, ended, counted, allowed)

    def _rights(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows count as past their warm-up, and which of these may skip."""
        if self._profile is None:
            return torch.zeros_like(real), torch.zeros_like(real)
        n_real = int(real.sum())
        if self._index < self._profile.skip.warm_up:
            self._warm_up_tokens += n_real
            return torch.zeros_like(real), torch.zeros_like(real)
        self._tokens += n_real
        return real, real & may_skip(torch.tensor(self._index), self._profile.skip)

    @torch.inference_mode(False)  # or what is built here could not be written outside of a decode
    def reserve(self, batch: int, capacity: int) -> None:
        """A step for so many sequences of so many tokens: the one that is there, if it will do."""
        if self._step is not None:
            cache = self._step.cache
            if cache.batch == batch and cache.capacity >= capacity:
                return
            self._earlier, self._seconds = self.stats, self.seconds() or {}
            self._step, self._tokens, self._warm_up_tokens = None, 0, 0
        roomy = min(-(-capacity // _ROOM) * _ROOM, self._fused.max_length)
        cache = KeyValueCache.allocate(self._fused, batch, roomy, self._cache_dtype)
        self._step = build_step(self._fused, cache, self._skip)

    @property
    def _cache_dtype(self) -> torch.dtype:
        """The model's, or float32 for one that a step does not read (packed weights of a float16 model)."""
        dtype = self._model.dtype
        return dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32

    def check(self) -> None:
        """Compare a few dense steps with the model's own forward pass.

        Raises:
            UnsupportedModelError: they differ by more than rounding.
        """
        n_prompt, n_steps = _CHECKED
        tokens = torch.arange(n_prompt + n_steps, device=self._fused.device)[None] * 7919 % self._fused.vocabulary
        no = torch.zeros(1, dtype=torch.bool)
        with torch.inference_mode():
            expected = self._model(tokens, use_cache=False).logits[:, n_prompt:].float()
            cache = KeyValueCache.allocate(self._fused, 1, n_prompt + n_steps, self._cache_dtype)
            step = build_step(self._fused, cache, None)
            _read_prompts(self._model, tokens[:, :n_prompt], None, cache)
            found = torch.stack([step(tokens[:, n_prompt + i], no, no, no).clone() for i in range(n_steps)], dim=1)
        error = float((found - expected).norm() / expected.norm())
        if not error <= _TOLERANCE.get(self._model.dtype, _ROUNDED):
            raise UnsupportedModelError(
                f"The fused decode step gives other logits than the model (relative error {error:.2g}): it is not used."
            )


class _Turn:
    """One decode on a fused path."""

    def __init__(self, path: FusedPath, max_new_tokens: int) -> None:
        self._path = path
        self._max_new_tokens = max_new_tokens

    def read(self, prompts: Tensor, mask: Tensor | None) -> Tensor:
        self._path.reserve(len(prompts), prompts.shape[1] + self._max_new_tokens)
        self._path.turn = self
        return self._path.read(prompts, mask)

    def step(self, tokens: Tensor, ended: Tensor) -> Tensor:
        if self._path.turn is not self:
            raise FfnskipError("Another decode was started with this decoder: finish one before the next.")
        return self._path.step(tokens, ended)


def _refuse_without_compiler(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError on a CPU where no step can be compiled, before anything of the model is moved."""
    if model.device.type == "cpu":
        from ffnskip.fast.build import native_library

        native_library()


def _read_prompts(model: PreTrainedModel, prompts: Tensor, mask: Tensor | None, cache: KeyValueCache) -> Tensor:
    """Fill the cache by the model's own forward pass; logits ``[batch, vocabulary]`` of what follows."""
    from transformers import DynamicCache

    counting = torch.ones_like(prompts) if mask is None else mask
    kept = DynamicCache()  # without the model's configuration it keeps every position, whatever the window
    logits: Tensor = model(
        prompts,
        attention_mask=mask,
        position_ids=(counting.cumsum(-1) - 1).clamp(min=0),
        past_key_values=kept,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    cache.fill(kept, (counting == 0).sum(-1))
    return logits[:, -1]


def build_step(model: FusedModel, cache: KeyValueCache, skip: FusedSkip | None) -> Step:
    """The step for the device that the model is on.

    Raises:
        UnsupportedModelError: there is none for it, or what it is built with is missing.
    """
    if model.device.type == "cpu":
        from ffnskip.fast.cpu_step import NativeStep

        return NativeStep(model, cache, skip)
    if model.device.type == "cuda":
        from ffnskip.fast.cuda.cuda_step import CudaStep

        return CudaStep(model, cache, skip)
    raise UnsupportedModelError(f"On {model.device.type} there is no fused decode step.")
