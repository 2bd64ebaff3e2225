"""Where in the model the damage is: what each layer's skipping adds to the KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ffnskip.general.wrap import Applied
from ffnskip.profiles.profile import Profile
from ffnskip_cli.measure.quality import Way, measure_quality
from ffnskip_cli.progress import Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class KeptDense:
    """The profile's own rule, but for one layer that runs in full."""

    layer: int

    def applied(self, model: PreTrainedModel, profile: Profile, sequence: Tensor) -> Applied:
        """See `ffnskip_cli.measure.quality.Way`."""
        return Applied(model, profile, "score", dense_layers=frozenset((self.layer,)))


def kl_by_layer(model: PreTrainedModel, profile: Profile, text: Tensor, track: Track) -> list[float]:
    """For each layer, the KL of the profile minus the KL with this layer dense, nats per token.

    The sum is not the KL itself: errors of several layers add up to more than each alone, or cancel.

    Args:
        model: the dense model.
        profile: for this model.
        text: ``[sequences, length]``; scored once more for every layer of the skip region.
        track: shows progress.
    """
    region = range(profile.skip.cold_s, profile.skip.cold_e)
    ways: list[Way | None] = [None, *(KeptDense(layer) for layer in region)]
    whole, *without = measure_quality(model, [profile] * len(ways), text, track, what="layer by layer", ways=ways)
    added = dict(zip(region, (whole.kl.mean - quality.kl.mean for quality in without), strict=True))
    return [added.get(layer, 0.0) for layer in range(profile.model.n_layers)]
