"""The fused path of a decode: the model's own forward pass reads the prompt, a fused step does the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.decode import run
from ffnskip.errors import UnsupportedModelError
from ffnskip.fast.cache import KeyValueCache
from ffnskip.fast.families import FusedModel, fuse
from ffnskip.fast.skipping import FusedSkip, fuse_profile
from ffnskip.fast.step import Step
from ffnskip.profile import Profile
from ffnskip.rules import may_skip
from ffnskip.sampling import Sampling
from ffnskip.stats import SkipStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_BATCH = 16
_CHECKED = (5, 4)  # tokens that the check reads as a prompt, and steps that follow
# Relative error of the logits. The model itself rounds to bfloat16 behind every operation, a fused step does not; what
# is read wrongly is off by about 1.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class FusedPath:
    """One fused model and profile, for one decode after the other; a `Path` of the decode loop.

    Args:
        model: the model; see `fuse` for what becomes of it.
        profile: complete with its weights, or None to run dense.

    Raises:
        UnsupportedModelError: there is no fused step for this model, or none that runs here.
    """

    def __init__(self, model: PreTrainedModel, profile: Profile | None) -> None:
        self._model = model
        self._fused = fuse(model)
        self._profile = profile
        self._skip = None if profile is None else fuse_profile(profile, self._fused.intermediate, self._fused.device)
        self._step: Step | None = None
        self._tokens = self._warm_up_tokens = self._index = 0
        self._earlier = SkipStats(len(self._fused.layers))
        self.reserve(1, 1)  # fails here and not in the middle of a decode where no step can be built

    def takes(self, prompts: Tensor, mask: Tensor | None, max_new_tokens: int) -> bool:
        """Whether it can decode these: not too many at once, not too long, and padded on the left alone."""
        batch, length = prompts.shape
        padded_left = mask is None or bool((mask[:, 1:] >= mask[:, :-1]).all())
        return batch <= MAX_BATCH and length + max_new_tokens <= self._fused.max_length and padded_left

    def decode(
        self,
        prompts: Tensor,
        mask: Tensor | None,
        max_new_tokens: int,
        sampling: Sampling,
        stop_tokens: Collection[int],
    ) -> Iterator[Tensor]:
        """As `ffnskip.decode`."""
        self.reserve(len(prompts), prompts.shape[1] + max_new_tokens)
        return run(self, prompts, mask, max_new_tokens, sampling, stop_tokens)

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
        """See `Step`."""
        assert self._step is not None
        return self._step.seconds()

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
        return self._step(tokens, counted, allowed)

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

    def reserve(self, batch: int, capacity: int) -> None:
        """A step for so many sequences of so many tokens: the one that is there, if it will do."""
        if self._step is not None:
            cache = self._step.cache
            if cache.batch == batch and cache.capacity >= capacity:
                return
            self._earlier = self.stats
            self._step, self._tokens, self._warm_up_tokens = None, 0, 0
        cache = KeyValueCache.allocate(self._fused, batch, capacity, self._model.dtype)
        self._step = build_step(self._fused, cache, self._skip)

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
            cache = KeyValueCache.allocate(self._fused, 1, n_prompt + n_steps, self._model.dtype)
            step = build_step(self._fused, cache, None)
            _read_prompts(self._model, tokens[:, :n_prompt], None, cache)
            found = torch.stack([step(tokens[:, n_prompt + i], no, no).clone() for i in range(n_steps)], dim=1)
        error = float((found - expected).norm() / expected.norm())
        if not error <= _TOLERANCE[self._model.dtype]:
            raise UnsupportedModelError(
                f"The fused decode step gives other logits than the model (relative error {error:.2g}): it is not used."
            )


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
        from ffnskip.fast.native import NativeStep

        return NativeStep(model, cache, skip)
    if model.device.type == "cuda":
        from ffnskip.fast.cuda import CudaStep

        return CudaStep(model, cache, skip)
    raise UnsupportedModelError(f"On {model.device.type} there is no fused decode step.")
