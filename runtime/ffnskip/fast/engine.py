"""A model that a fused step can run, and the steps built for it: what outlives a decode.

`Steps` builds steps, each on a key-value cache of its own, and `FusedEngine` those of a Hugging Face model, which it
reads once. Who asks for them is `ffnskip.fast.fused_path`, behind `ffnskip.Decoder`, and `ffnskip.fast.fused_forward`,
behind the model's own `forward`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.errors import UnsupportedModelError
from ffnskip.fast.cache import KeyValueCache
from ffnskip.fast.families import fuse
from ffnskip.fast.fused_model import FusedModel
from ffnskip.fast.guard import Weights
from ffnskip.fast.parts import leaves_out_parts, refuse_parts
from ffnskip.fast.products import beats_pytorch, multiply
from ffnskip.fast.skipping import FusedSkip, fuse_profile
from ffnskip.fast.step import MAX_BATCH, FusedStep
from ffnskip.model.forward import forward, multiplied_by
from ffnskip.profiles.profile import Profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHECKED = (5, 4)  # tokens that the check reads as a prompt, and steps that follow
# Relative error of the logits. The model itself rounds to bfloat16 behind every operation, a fused step does not; what
# is read wrongly is off by about 1.
_ROUNDED = 0.1
_TOLERANCE = {torch.float32: 1e-3}
_LONGEST_READ = 2048  # tokens of a prompt, behind which PyTorch's attention is faster
ROOM = 512  # slots that a cache has at least for new tokens; it grows by doubling when they are full


class Steps:
    """Builds the steps of a fused model and its profile.

    Args:
        fused: the model as plain numbers, which is all that steps need.
        profile: complete with its weights, or None to run dense.

    Raises:
        UnsupportedModelError: there is no fused step for the profile's rule.
    """

    def __init__(self, fused: FusedModel, profile: Profile | None) -> None:
        self.fused = fused
        self.profile = profile
        self._skip = None if profile is None else fuse_profile(profile, fused.intermediate, fused.device)

    def why_not(self, batch: int, length: int) -> str | None:
        """Why there is no step for so many sequences of this length, in one sentence; None if there is."""
        if batch > MAX_BATCH:
            return f"The fused decode step takes at most {MAX_BATCH} sequences at once, not {batch}."
        if length > self.fused.max_length:
            return (
                f"The fused decode step takes at most {self.fused.max_length} positions, as the model does, and "
                f"{length} are more."
            )
        return None

    @torch.inference_mode(False)  # or what is built here could not be written outside of a decode
    def step(self, batch: int, capacity: int) -> FusedStep:
        """A new step with an empty cache for so many sequences of at least so many tokens."""
        roomy = min(-(-capacity // ROOM) * ROOM, self.fused.max_length)
        return build_step(self.fused, self._allocate(batch, roomy), self._skip)

    @torch.inference_mode(False)
    def grown(self, cache: KeyValueCache) -> FusedStep:
        """A new step that goes on with what is in a cache, in one twice as large."""
        return build_step(self.fused, cache.grown(min(2 * cache.capacity, self.fused.max_length)), self._skip)

    def _allocate(self, batch: int, capacity: int) -> KeyValueCache:
        """A cache in the model's precision, or in float32 where a step does not read that (a packed float16 model)."""
        dtype = self.fused.dtype if self.fused.dtype in (torch.float32, torch.bfloat16) else torch.float32
        return KeyValueCache.allocate(self.fused, batch, capacity, dtype)

    def reads_prompts(self, length: int) -> bool:
        """Whether steps read prompts of so many tokens: on a CPU, where no other way is faster."""
        return self.fused.device.type == "cpu" and read_by_steps(length, self.fused.dtype)

    def prefill(self, prompts: Tensor, mask: Tensor | None, step: FusedStep) -> Tensor:
        """Fill the step's cache; logits ``[batch, vocabulary]`` of what follows, which the next step may write over."""
        return step.read(prompts, _starts(prompts, mask))

    def check(self, model: PreTrainedModel) -> type:
        """Compare a short prompt and a few dense steps with the model's own forward pass; gives what class it returns.

        Raises:
            UnsupportedModelError: they differ by more than rounding.
        """
        n_prompt, n_steps = _CHECKED
        tokens = torch.arange(n_prompt + n_steps, device=self.fused.device)[None] * 7919 % self.fused.vocabulary
        no = torch.zeros(1, dtype=torch.bool)
        with torch.inference_mode():
            output = forward(model, tokens, use_cache=False)
            expected = output.logits[:, n_prompt - 1 :].float()
            step = build_step(self.fused, self._allocate(1, n_prompt + n_steps), None)
            logits = [self.prefill(tokens[:, :n_prompt], None, step).float().clone()]
            logits += [step(tokens[:, n_prompt + i], no, no, no).clone() for i in range(n_steps)]
        error = float((torch.stack(logits, dim=1) - expected).norm() / expected.norm())
        if not error <= _TOLERANCE.get(self.fused.dtype, _ROUNDED):
            raise UnsupportedModelError(
                f"The fused decode step gives other logits than the model (relative error {error:.2g}): it is not used."
            )
        return type(output)


class FusedEngine(Steps):
    """The steps of a Hugging Face model, which may change meanwhile, and reads prompts itself where that is faster.

    Args:
        model: the model; see `fuse` for what becomes of it.
        profile: complete with its weights, or None to run dense.

    Raises:
        UnsupportedModelError: there is no fused step for this model, or none that runs here.
    """

    def __init__(self, model: PreTrainedModel, profile: Profile | None) -> None:
        self.model = model
        _refuse_without_compiler(model)
        self._by_input = leaves_out_parts(profile)
        if self._by_input:
            refuse_parts(model)
        super().__init__(fuse(model, by_input=self._by_input), profile)
        self._weights = Weights(model)

    @property
    def stale(self) -> bool:
        """Whether the model's weights have changed since they were read."""
        return self._weights.changed

    def lay_out_by_row(self) -> None:
        """Let the model's matrices lie row by row, as those of other models do, when no step reads them any more."""
        if self._by_input and not self.stale:
            fuse(self.model)

    def prefill(self, prompts: Tensor, mask: Tensor | None, step: FusedStep) -> Tensor:
        """See `Steps`. The model's own forward pass does it where that is faster, or steps cannot.

        There, too, matrices are multiplied as they are stored, if that pays.
        """
        if self.reads_prompts(prompts.shape[1]):
            return super().prefill(prompts, mask, step)
        from transformers import DynamicCache

        real = torch.ones_like(prompts) if mask is None else mask
        past = DynamicCache()  # without the model's configuration it keeps every position, whatever the window
        with multiplied_by(multiply):
            output = forward(
                self.model,
                prompts,
                attention_mask=mask,
                position_ids=(real.cumsum(-1) - 1).clamp(min=0),
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
            )
        step.cache.fill(past, _starts(prompts, mask))
        logits: Tensor = output.logits[:, -1]
        return logits


def read_by_steps(length: int, dtype: torch.dtype) -> bool:
    """Whether steps on a CPU read prompts of so many tokens at least as fast as a model in such a type does."""
    return length <= _LONGEST_READ and beats_pytorch(dtype)


def _starts(prompts: Tensor, mask: Tensor | None) -> Tensor:
    """Where each prompt begins behind its padding, ``[batch]``."""
    return ((torch.ones_like(prompts) if mask is None else mask) == 0).sum(-1)


def _refuse_without_compiler(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError on a CPU where no step can be compiled, before anything of the model is moved."""
    if model.device.type == "cpu":
        from ffnskip.fast.build import step_library

        step_library()


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
