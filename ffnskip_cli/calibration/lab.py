"""What every stage of a calibration is handed, and how a stage says what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from ffnskip.profiles.profile import Profile
from ffnskip_cli.calibration.settings import Settings
from ffnskip_cli.measure.quality import Quality, measure_quality
from ffnskip_cli.progress import Journal, Track, silently

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
