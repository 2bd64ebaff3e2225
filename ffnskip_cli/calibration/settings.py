"""What a calibration is asked to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ffnskip.errors import FfnskipError
from ffnskip.rules import rule_named

if TYPE_CHECKING:
    from ffnskip_cli.measure.quality import Quality

On = Literal["text", "generated"]
Rule = Literal["predicted-damage", "cosine"]
Kind = Literal["auto", "none", "mean", "low-rank", "linear"]
Free = Literal["auto"]  # a setting that the calibration chooses by what it does to quality

PROMPT_TOKENS = GENERATED_TOKENS = 128  # of the paper's calibration, for `on="generated"`
DEFAULT_WARM_UP = 25  # where nothing better is known; the paper's Figure 5 levels off there

_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Goal:
    """What a profile is to reach: a skip_ratio, or the largest one that stays within a limit on what it costs.

    Attributes:
        kind: the field of `ffnskip.profiles.schema.Measured` that records it.
        value: the ratio; the limit on KL in nats per token; the limit on perplexity / perplexity_dense - 1.
    """

    kind: Literal["target_ratio", "max_kl", "max_perplexity_increase"]
    value: float

    def __post_init__(self) -> None:
        if self.kind == "target_ratio" and not 0.0 < self.value < 1.0:
            raise FfnskipError(f"The target {self.value:g} is not a ratio between 0 and 1, such as 0.10.")
        if not 0.0 < self.value < math.inf:
            raise FfnskipError(f"The limit {self.value:g} is not a number above 0.")

    def __str__(self) -> str:
        match self.kind:
            case "target_ratio":
                return f"a skip ratio of {self.value:g}"
            case "max_kl":
                return f"a KL of at most {self.value:g}"
            case _:
                return f"a perplexity at most {100 * self.value:g}% above dense"

    @property
    def file_name(self) -> str:
        """Of its profile in a folder of them: `0.10.yaml`, `kl-0.05.yaml`, `perplexity-2pct.yaml`."""
        match self.kind:
            case "target_ratio":
                return f"{self.value:{'.2f' if round(self.value, 2) == self.value else 'g'}}.yaml"
            case "max_kl":
                return f"kl-{self.value:g}.yaml"
            case _:
                return f"perplexity-{100 * self.value:g}pct.yaml"

    def cost(self, quality: Quality) -> float:
        """What is held against the limit."""
        if self.kind == "max_kl":
            return quality.kl.mean
        return quality.perplexity.mean / quality.perplexity_dense.mean - 1.0


@dataclass(frozen=True)
class Settings:
    """The choices of one calibration run.

    Attributes:
        goals: what to compile a profile for, each from the same recording.
        tokens, eval_tokens: how much text to calibrate on, and how much to measure quality on.
        sequence_length: tokens per sequence.
        warm_up, window, refresh_every: the rule's settings (see `ffnskip.profiles.schema.Skip`), or auto.
        cold_s, cold_e: the skip region; None where the calibration chooses.
        candidates: how many regions, windows and refreshes to try at most; 0 takes what the curve proposes.
        rule: when to skip.
        compensate: what kind of compensation to fit.
        rank, neurons: its size; None for the usual one.
        fit_tokens: how much text to fit it to.
        on: record on the text itself, or on what the model generates from 128-token prompts.
        seed: order of the documents.
    """

    goals: tuple[Goal, ...]
    tokens: int = 16384
    eval_tokens: int = 8192
    sequence_length: int = 256
    warm_up: int | Free = "auto"
    window: int | Free | None = "auto"
    refresh_every: int | Free | None = "auto"
    cold_s: int | None = None
    cold_e: int | None = None
    candidates: int = 16
    rule: Rule = "cosine"
    compensate: Kind = "none"
    rank: int | None = None
    neurons: int | None = None
    fit_tokens: int = 98304
    on: On = "text"
    seed: int = 0

    @property
    def recorded_tokens(self) -> int:
        """Tokens of each sequence that are recorded: all of a text; of a decode those that were generated."""
        return recorded_tokens(self.on, self.sequence_length)

    @property
    def probes(self) -> bool:
        """Whether the rule has probes to fit."""
        return rule_named(self.rule).reads == "input"

    @property
    def fits(self) -> bool:
        """Whether there is a probe or a compensation to fit."""
        return self.probes or self.compensate != "none"

    def refuse_region(self, n_layers: int) -> None:
        """Raise FfnskipError if what is pinned is no region of a model with `n_layers`, or too small for every goal."""
        cold_s = self.cold_s if self.cold_s is not None else 0
        cold_e = self.cold_e if self.cold_e is not None else n_layers
        if not 0 <= cold_s < cold_e <= n_layers:
            raise FfnskipError(
                f"The skip region [{cold_s}, {cold_e}) is not one: --cold-s must be less than --cold-e, and both lie "
                f"within the model's {n_layers} layers."
            )
        rule = rule_named(self.rule)
        most = len(rule.can_skip(cold_s, cold_e)) / n_layers
        if self.goals and all(goal.kind == "target_ratio" and goal.value > most for goal in self.goals):
            raise FfnskipError(
                f"A skip ratio of {self.goals[0].value:g} cannot be reached: layers {cold_s} to {cold_e - 1} allow at "
                f"most {most:.3f}{', because ' * bool(rule.why_fewer)}{rule.why_fewer}."
            )

    def __post_init__(self) -> None:
        numbers = (self.tokens, self.eval_tokens, self.fit_tokens, self.window, self.refresh_every)
        largest = max(number for number in numbers if isinstance(number, int))
        if largest > _LARGEST:
            raise FfnskipError(f"{largest} is larger than any number in a profile: ask for less.")
        if self.warm_up != "auto" and self.warm_up > self.recorded_tokens - 2:
            raise FfnskipError(
                f"A warm-up of {self.warm_up} tokens leaves nothing to calibrate on: --warm-up must be at most "
                f"{self.recorded_tokens - 2} here."
            )
        if not rule_named(self.rule).has_window and (self.window != "auto" and self.window is not None):
            raise FfnskipError("--window belongs to --rule cosine: with predicted-damage every layer decides alone.")
        if self.rank is not None and self.compensate != "low-rank":
            raise FfnskipError("--rank belongs to --compensate low-rank.")
        if self.neurons and self.compensate not in ("low-rank", "linear"):
            raise FfnskipError("--neurons belongs to --compensate low-rank or linear.")
        if self.on == "generated" and self.sequence_length != PROMPT_TOKENS + GENERATED_TOKENS:
            raise FfnskipError("With --on generated the --sequence-length is 256: prompts of 128 tokens, then 128 new.")


def recorded_tokens(on: On, sequence_length: int) -> int:
    """Tokens of each sequence that are recorded."""
    return sequence_length if on == "text" else GENERATED_TOKENS
