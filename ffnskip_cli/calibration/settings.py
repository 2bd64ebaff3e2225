"""What a calibration is asked to do."""

from dataclasses import dataclass
from typing import Literal

from ffnskip.errors import FfnskipError

PROMPT_TOKENS = GENERATED_TOKENS = 128  # of the paper's calibration, for `on="generated"`

_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Settings:
    """The choices of one calibration run.

    Attributes:
        targets: skip_ratios to compile a profile for, each from the same recording.
        tokens, eval_tokens: how much text to calibrate on, and how much to measure quality on.
        sequence_length: tokens per sequence.
        warm_up, window, refresh_every: the rule's settings (see `ffnskip.profile.Skip`).
        cold_s, cold_e: the skip region; None where the similarity curve decides.
        on: record on the text itself, or on what the model generates from 128-token prompts.
        seed: order of the documents.
    """

    targets: tuple[float, ...]
    tokens: int = 16384
    eval_tokens: int = 8192
    sequence_length: int = 256
    warm_up: int = 25
    window: int | None = None
    refresh_every: int | None = None
    cold_s: int | None = None
    cold_e: int | None = None
    on: Literal["text", "generated"] = "text"
    seed: int = 0

    def __post_init__(self) -> None:
        for target in self.targets:
            if not 0.0 < target < 1.0:
                raise FfnskipError(f"The target {target:g} is not a ratio between 0 and 1, such as 0.10.")
        largest = max(self.tokens, self.eval_tokens, self.window or 0, self.refresh_every or 0)
        if largest > _LARGEST:
            raise FfnskipError(f"{largest} is larger than any number in a profile: ask for less.")
        recorded = self.sequence_length if self.on == "text" else GENERATED_TOKENS
        if self.warm_up > recorded - 2:
            raise FfnskipError(
                f"A warm-up of {self.warm_up} tokens leaves nothing to calibrate on: --warm-up must be at most "
                f"{recorded - 2} here."
            )
        if self.on == "generated" and self.sequence_length != PROMPT_TOKENS + GENERATED_TOKENS:
            raise FfnskipError("With --on generated the --sequence-length is 256: prompts of 128 tokens, then 128 new.")
