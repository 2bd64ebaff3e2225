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
        self._decodes = FusedDecodes(Steps(fused, profile), SkipStats(len(fused.layers)))

    @property
    def stats(self) -> SkipStats:
        """What was skipped."""
        self._decodes.drain_counts()
        return self._decodes.stats

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
