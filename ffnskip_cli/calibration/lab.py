"""What every stage of a calibration is handed, and how a stage says what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.decode import GeneralPath, generate_tokens
from ffnskip.model.forward import forward
from ffnskip.model.sites import input_device
from ffnskip.profiles.profile import Profile
from ffnskip_cli.calibration.recording.record import BLOCK
from ffnskip_cli.calibration.settings import Settings
from ffnskip_cli.measure.quality import Quality, measure_quality
from ffnskip_cli.progress import Journal, Track, silently

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TIMED = 3  # passes and decode steps that an estimate of the time rests on


@dataclass(frozen=True)
class Lab:
    """The dense model, with what shows the progress of measurements on it and what remembers them."""

    model: PreTrainedModel
    track: Track = silently
    journal: Journal = field(default_factory=Journal)

    def quality(
        self, profiles: Sequence[Profile], tokens: Tensor, what: str = "measuring quality", first: int | None = None
    ) -> list[Quality]:
        """What each profile costs on ``tokens [sequences, length]``; see `measure_quality`."""
        return measure_quality(self.model, profiles, tokens, self.track, what=what, first=first, journal=self.journal)

    @torch.inference_mode()
    def seconds(self, tokens: Tensor, planned: Sequence[Step]) -> list[float]:
        """How long each step will take at most, from a few passes over ``tokens [sequences, length]`` timed now."""
        device = input_device(self.model)
        sequence = tokens[:1].long().to(device)
        of_pass = _median_time(
            lambda: forward(self.model, sequence, use_cache=False).logits.float().log_softmax(-1)[0, -1, 0].item()
        )
        of_decode_step = 0.0
        if any(step.decode_steps for step in planned):
            prompts = tokens[: BLOCK["generated"], : tokens.shape[1] // 2].long().to(device)
            path = GeneralPath(self.model)
            ticks = [time.perf_counter() for _ in generate_tokens(path, prompts, max_new_tokens=_TIMED + 1)]
            of_decode_step = (ticks[-1] - ticks[0]) / _TIMED
        return [step.passes * of_pass + step.decode_steps * of_decode_step for step in planned]


@dataclass(frozen=True)
class Step:
    """One step of a calibration, and at most what it costs.

    Attributes:
        name: what it does.
        passes: forward passes over one sequence each.
        decode_steps: forward passes that generate one token for each of up to 16 sequences.
    """

    name: str
    passes: int
    decode_steps: int = 0


@dataclass(frozen=True)
class Sizes:
    """How much text a calibration has, in sequences.

    Attributes:
        to_record: of the calibration text, what this process has yet to record.
        recorded: of the calibration text in all.
        fit: of the text to fit to.
        held_out: of the text to measure on.
        length: tokens per sequence.
    """

    to_record: int
    recorded: int
    fit: int
    held_out: int
    length: int

    @classmethod
    def of(cls, settings: Settings, to_record: int, held_out: int) -> Sizes:
        """As the settings ask for."""
        length = settings.sequence_length
        return cls(to_record, settings.tokens // length, settings.fit_tokens // length, held_out, length)


def _median_time(run: Callable[[], object]) -> float:
    run()  # the first one is slow
    times = []
    for _ in range(_TIMED):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)
