"""Step 5: run the model with the rule on, and correct the threshold until the measured ratio is the target.

The simulation cannot know that a skip changes the similarities of the later layers and, through the KV cache, of the
later tokens. The measured ratio does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ffnskip.errors import FfnskipError
from ffnskip.layers import decoder
from ffnskip.profile import Profile
from ffnskip.wrap import Applied
from ffnskip_cli.calibration.record import Record
from ffnskip_cli.calibration.solve import highest_ratio, solve_threshold
from ffnskip_cli.track import Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMISED = 0.01  # how far from the target a verified ratio may be
GOOD_ENOUGH = 0.002  # where correcting stops
_ROUNDS = 6


@dataclass(frozen=True)
class Verified:
    """A threshold and the skip_ratio that the running model has with it on the calibration text."""

    threshold: float
    ratio: float


@torch.inference_mode()
def measure_ratio(model: PreTrainedModel, profile: Profile, record: Record, track: Track) -> float:
    """The skip_ratio of the running model on the record's sequences, in score mode behind their prompts."""
    skip = profile.skip.model_copy(update={"warm_up": profile.skip.warm_up + record.prompt_tokens})
    body = decoder(model)
    with Applied(model, profile.model_copy(update={"skip": skip}), "score") as applied:
        for sequence in track(record.sequences, "verifying", len(record.sequences)):
            body(sequence[None].to(model.device), use_cache=False)
        return applied.stats.skip_ratio


def verify(model: PreTrainedModel, profile: Profile, record: Record, target: float, track: Track) -> Verified:
    """Correct the profile's threshold in closed loop.

    Each round asks the simulation for the ratio at which the measured one should meet the target, on the straight line
    between the closest measurements below and above it. Two points are known before the first: what skips never, and
    what skips always, does so in the running model too.

    Raises:
        FfnskipError: no round came within 0.01 of the target.
    """
    most = highest_ratio(record, profile.skip)
    (low, low_measured), (high, high_measured) = (0.0, 0.0), (most, most)
    asked, best = target, Verified(profile.skip.threshold, float("inf"))
    for _ in range(_ROUNDS):
        threshold = solve_threshold(record, profile.skip, asked)
        measured = Verified(threshold, measure_ratio(model, with_threshold(profile, threshold), record, track))
        if abs(measured.ratio - target) < abs(best.ratio - target):
            best = measured
        if abs(best.ratio - target) <= GOOD_ENOUGH:
            return best
        if measured.ratio < target:
            low, low_measured = asked, measured.ratio
        else:
            high, high_measured = asked, measured.ratio
        asked = low + (high - low) * (target - low_measured) / (high_measured - low_measured)
    if abs(best.ratio - target) > PROMISED:
        raise FfnskipError(
            f"A skip ratio of {target:g} cannot be reached: skipping changes the later similarities so much that the "
            f"closest threshold, {best.threshold:g}, gives {best.ratio:.3f}."
        )
    return best


def with_threshold(profile: Profile, threshold: float) -> Profile:
    """The same profile with another threshold."""
    return profile.model_copy(update={"skip": profile.skip.model_copy(update={"threshold": threshold})})
