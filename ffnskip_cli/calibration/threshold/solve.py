"""Solve the threshold for a target: by simulating the rule on what was recorded, then in the running model.

The simulation cannot know that a skip changes the values of the later layers and, through the KV cache, of the later
tokens. The measured ratio does, so the threshold is corrected until what the running model saves is the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffnskip.errors import FfnskipError
from ffnskip.general.wrap import Applied
from ffnskip.model.sites import decoder_body, input_device
from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Skip
from ffnskip.rules import may_skip
from ffnskip.stats import SkipStats
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.recording.record import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERIFY_TOKENS = 16384  # that the model runs on, however long the recording is
PROMISED = 0.01  # how far from the target a verified ratio may be
GOOD_ENOUGH = 0.003  # where correcting stops
VERIFY_ROUNDS = 8


def simulated_ratio(record: Record, skip: Skip) -> float:
    """The skip_ratio that the rule has on the record: skipped FFNs / (n_layers x tokens past warm-up)."""
    skipped, blocks = 0.0, 0
    recorded = record.values.shape[1]
    allowed = may_skip(torch.arange(skip.warm_up, recorded), skip)
    for values in record.chunks(skip.warm_up):
        tokens = values.flatten(0, 1)
        skipped += float(skip.by.simulate(tokens, allowed.repeat(len(values)), skip).sum(dtype=torch.float64))
        blocks += tokens.shape[0] * tokens.shape[1]
    return skipped / blocks


def highest_ratio(record: Record, skip: Skip) -> float:
    """The ratio at which every token skips as soon as it can."""
    rule = skip.by
    return simulated_ratio(record, skip.model_copy(update={"threshold": rule.threshold_at(rule.steps[0])}))


def refuse_beyond(record: Record, skip: Skip, ratio: float) -> float:
    """Return the highest ratio; raise FfnskipError if `ratio` is more."""
    if ratio > (most := highest_ratio(record, skip)):
        fewer = skip.by.why_fewer
        why = "as --cold-s and --cold-e say"
        if fewer:
            why = f"because {fewer}; --cold-s, --cold-e and --window decide that"
        raise FfnskipError(
            f"A skip ratio of {ratio:g} cannot be reached: layers {skip.cold_s} to {skip.cold_e - 1} allow at most "
            f"{most:.3f}, {why}."
        )
    return most


def solve_threshold(record: Record, skip: Skip, ratio: float) -> float:
    """The strictest threshold at which the simulated ratio reaches `ratio`, among the rule's steps.

    By bisection. With a `window` the ratio can rise by a few skips as the threshold gets stricter, where an earlier
    trigger would use up its window before better layers come; the solution is then one of several.

    Args:
        record: the dense model's similarities, or the scores of the model's probes.
        skip: the rule; its threshold is ignored.
        ratio: skip_ratio to reach.

    Raises:
        FfnskipError: the region is too small for the ratio.
    """
    refuse_beyond(record, skip, ratio)
    rule = skip.by
    low, high = rule.steps[0], rule.steps[-1]  # whole steps, so that what is returned was simulated
    while high - low > 1:
        middle = (low + high) // 2
        tried = skip.model_copy(update={"threshold": rule.threshold_at(middle)})
        low, high = (middle, high) if simulated_ratio(record, tried) >= ratio else (low, middle)
    return rule.threshold_at(low)


@dataclass(frozen=True)
class Verified:
    """A threshold and the skip_ratio that the running model has with it on the calibration text."""

    threshold: float
    ratio: float


def behind_prompts(profile: Profile, record: Record) -> Profile:
    """The profile for score mode on the record's sequences, where a prompt is part of the warm-up."""
    skip = profile.skip.model_copy(update={"warm_up": profile.skip.warm_up + record.prompt_tokens})
    return profile.model_copy(update={"skip": skip})


@dataclass(frozen=True)
class Figure:
    """What is to reach a target.

    Attributes:
        name: in words.
        of: the figure of a run's counts.
        scale: about how much of it there is for a skip_ratio of 1.
    """

    name: str
    of: Callable[[SkipStats], float]
    scale: float = 1.0


SKIP_RATIO = Figure("A skip ratio", lambda stats: stats.skip_ratio)


def measure_ratio(lab: Lab, profile: Profile, record: Record) -> float:
    """The skip_ratio of the running model on the record's sequences; see `measure`."""
    return measure(lab, profile, record)[0]


def measure(lab: Lab, profile: Profile, record: Record) -> tuple[float, SkipStats]:
    """The skip_ratio of the running model on the record's sequences, in score mode behind their prompts, and counts.

    Run on `VERIFY_TOKENS` of them; on the rest the ratio is taken to differ as the simulated one does.
    """
    sample, threshold = record.first(VERIFY_TOKENS), profile.skip.threshold
    # The sample says what the simulation is wrong by, the whole recording what it says.
    rest = simulated_ratio(record, profile.skip) - simulated_ratio(sample, profile.skip)
    profile = behind_prompts(profile, record)
    settings, total = profile.deciding, SkipStats(profile.model.n_layers)
    for sequence in lab.track(sample.sequences, f"verifying threshold {threshold:g}", len(sample.sequences)):
        key = ["ratio", settings, sequence.tolist()]
        counts = lab.journal.remember(key, partial(count_skips, lab.model, profile, sequence))
        total.add(SkipStats(**counts))
    return total.skip_ratio + rest, total


@torch.inference_mode()
def count_skips(model: PreTrainedModel, profile: Profile, sequence: Tensor) -> dict[str, Any]:
    """The fields of `SkipStats` for one ``sequence [length]``, in score mode."""
    with Applied(model, profile, "score") as applied:
        decoder_body(model)(sequence[None].long().to(input_device(model)), use_cache=False)
    return asdict(applied.stats)


def verify(lab: Lab, profile: Profile, record: Record, target: float, figure: Figure = SKIP_RATIO) -> Verified:
    """Correct the profile's threshold in closed loop.

    Each round asks the simulation for another ratio, until the measured figure is the target.

    Raises:
        FfnskipError: no round came within 0.01 of the target.
    """
    most = highest_ratio(record, profile.skip)
    # Two ends are known before any measurement: a threshold that nothing passes skips nothing in the running model
    # too, and one that everything passes skips as much as in the simulation.
    asked, bracket = target / figure.scale, Bracket((0.0, -target), (most, most * figure.scale - target))
    best, closest = Verified(profile.skip.threshold, 0.0), math.inf
    for _ in range(VERIFY_ROUNDS):
        threshold = solve_threshold(record, profile.skip, asked)
        ratio, stats = measure(lab, profile.with_threshold(threshold), record)
        # On the whole recording the figure differs from the sample's as the ratio does.
        reached = figure.of(stats) + (ratio - stats.skip_ratio) * figure.scale
        if abs(reached - target) < abs(closest - target):
            best, closest = Verified(threshold, ratio), reached
        if abs(closest - target) <= GOOD_ENOUGH:
            return best
        asked = bracket.next(asked, reached - target)
    if abs(closest - target) > PROMISED:
        raise FfnskipError(
            f"{figure.name} of {target:g} cannot be reached: the closest threshold found, {best.threshold:g}, gives "
            f"{closest:.3f} in the running model; ask for that instead."
        )
    return best


class Bracket:
    """What to ask the simulation for next: regula falsi with the Illinois rule (Dowell and Jarratt 1971).

    Args:
        low, high: the closest ratios asked for that gave too little and too much, each with its error: what was
            measured minus what was wanted.
    """

    def __init__(self, low: tuple[float, float], high: tuple[float, float]) -> None:
        self._low, self._low_error = low
        self._high, self._high_error = high
        self._last_error = 0.0

    def next(self, asked: float, error: float) -> float:
        """Take in the error at `asked`, and return what to ask for then."""
        again = error * self._last_error > 0  # on the same side: pull the next one over by halving the other end
        if error < 0:
            self._low, self._low_error = asked, error
            self._high_error *= 0.5 if again else 1.0
        else:
            self._high, self._high_error = asked, error
            self._low_error *= 0.5 if again else 1.0
        self._last_error = error
        return self.between

    @property
    def between(self) -> float:
        """Where the straight line between the ends has no error."""
        step = self._low_error * (self._high - self._low) / (self._high_error - self._low_error)
        return min(self._low - step, self._high)  # rounding must not ask for more than there is
