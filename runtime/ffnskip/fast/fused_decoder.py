"""Decode with a fused model alone, where the model that it was read from is not loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor

from ffnskip.decode import generate_tokens
from ffnskip.fast.engine import Steps
from ffnskip.fast.fused_model import FusedModel
from ffnskip.fast.fused_path import FusedDecodes
from ffnskip.profiles.profile import Profile
from ffnskip.sampling import GREEDY, Sampling
from ffnskip.stats import SkipStats

_SOON_READ = 256  # tokens of a prompt that a step has read before the model could be loaded to read them faster


class FusedDecoder:
    """Continues a prompt as `ffnskip.Decoder` does on its fused path.

    Args:
        fused: the model, on a CPU.
        profile: one for it, complete with its weights, or None to run dense.

    Raises:
        UnsupportedModelError: there is no fused step for the profile's rule, or none that runs here.
    """

    def __init__(self, fused: FusedModel, profile: Profile | None) -> None:
        self.profile = profile
        self._steps = Steps(fused, profile)
        self._decodes = FusedDecodes(self._steps, SkipStats(len(fused.layers)))

    @property
    def stats(self) -> SkipStats:
        """What was skipped."""
        self._decodes.drain_counts()
        return self._decodes.stats

    def takes(self, prompt: int, max_new_tokens: int) -> bool:
        """Whether it can continue a prompt of so many tokens, and the model itself would not read that sooner."""
        reads = prompt <= _SOON_READ or self._steps.reads_prompts(prompt)
        return reads and self._steps.why_not(1, prompt + max_new_tokens) is None

    def decode(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop_tokens: Collection[int] = (),
    ) -> Iterator[Tensor]:
        """See `ffnskip.Decoder.decode`; of one prompt, ``[1, prompt]``."""
        path = self._decodes.path(max_new_tokens)
        return generate_tokens(
            path, input_ids, max_new_tokens=max_new_tokens, sampling=sampling, stop_tokens=stop_tokens
        )
