"""What a calibration is asked to do: each choice once, for Python and, annotated as an option, for the command line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ffnskip.errors import FfnskipError
from ffnskip.rules import rule_named, rule_names

if TYPE_CHECKING:
    from ffnskip_cli.measure.quality import Quality

On = Literal["text", "generated"]
Kind = Literal["auto", "none", "mean", "low-rank", "linear"]
GoalKind = Literal["target_ratio", "target_flops", "max_kl", "max_perplexity_increase"]
Free = Literal["auto"]  # a setting that the calibration chooses by what it does to quality

PROMPT_TOKENS = GENERATED_TOKENS = 128  # of the paper's calibration, for `on="generated"`
DEFAULT_WARM_UP = 25  # where nothing better is known; the paper's Figure 5 levels off there

_LARGEST = 2**63 - 1
_DIGITS = 18  # of a number that a profile can hold
_MAX_SEED = 2**32 - 1  # more would not fit into every random generator


def seed_option(help: str) -> Any:
    """The option --seed."""
    return typer.Option(metavar="N", min=0, max=_MAX_SEED, help=help)


def count_option(name: str, least: int, help: str, *, none: bool = False, show_default: bool = True) -> Any:
    """An option that is a whole number of at least `least`, auto, or, if allowed, none."""
    metavar = "N|none|auto" if none else "N|auto"
    return typer.Option(metavar=metavar, help=help, show_default=show_default, parser=_count_parser(name, least, none))


def _count_parser(option: str, least: int, none: bool) -> Callable[[str], int | Free | None]:
    def parse(text: str) -> int | Free | None:
        if text == "auto":
            return "auto"
        if none and text == "none":
            return None
        if not (text.isascii() and text.isdigit()) or len(text) > _DIGITS or int(text) < least:
            words = "none or auto" if none else "auto"
            shown = text if len(text) <= 60 else f"{text[:59]}…"
            raise FfnskipError(f"{option} must be a whole number from {least} on, {words}, not {shown}.")
        return int(text)

    return parse


@dataclass(frozen=True)
class Goal:
    """What a profile is to reach: a saving, or the largest one that stays within a limit on what it costs.

    Attributes:
        kind: the field of `ffnskip.profiles.evidence.Measured` that records it.
        value: the skip_ratio; the share of all FLOPs past warm-up; the limit on KL in nats per token; the limit on
            perplexity / perplexity_dense - 1.
    """

    kind: GoalKind
    value: float

    def __post_init__(self) -> None:
        if not self.is_limit and not 0.0 < self.value < 1.0:
            raise FfnskipError(f"The target {self.value:g} is not a ratio between 0 and 1, such as 0.10.")
        if not 0.0 < self.value < math.inf:
            raise FfnskipError(f"The limit {self.value:g} is not a number above 0.")

    @property
    def is_limit(self) -> bool:
        """Whether it bounds the cost, instead of saying what to save."""
        return self.kind in ("max_kl", "max_perplexity_increase")

    def __str__(self) -> str:
        match self.kind:
            case "target_ratio":
                return f"a skip ratio of {self.value:g}"
            case "target_flops":
                return f"a saving of {self.value:g} of the FLOPs past warm-up"
            case "max_kl":
                return f"a KL of at most {self.value:g}"
            case _:
                return f"a perplexity at most {100 * self.value:g}% above dense"

    @property
    def file_name(self) -> str:
        """In a folder of profiles: `0.10.yaml`, `flops-0.20.yaml`, `kl-0.05.yaml`, `perplexity-2pct.yaml`."""
        share = f"{self.value:{'.2f' if round(self.value, 2) == self.value else 'g'}}"
        match self.kind:
            case "target_ratio":
                return f"{share}.yaml"
            case "target_flops":
                return f"flops-{share}.yaml"
            case "max_kl":
                return f"kl-{self.value:g}.yaml"
            case _:
                return f"perplexity-{100 * self.value:g}pct.yaml"

    def cost(self, quality: Quality) -> float:
        """What is held against the limit."""
        if self.kind == "max_kl":
            return quality.kl.mean
        return quality.perplexity.mean / quality.perplexity_dense.mean - 1.0


EvalTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to measure quality on.")]


@dataclass(frozen=True)
class Settings:
    """The choices of one calibration. `goals` is what to compile a profile for, each from the same recording."""

    goals: tuple[Goal, ...] = ()
    rule: Annotated[
        str,
        typer.Option(
            metavar="|".join(rule_names()),
            help="What to skip: parts of FFNs and attention at one price; or whole FFNs, by the damage that a probe "
            "predicts or by similarity as in the paper.",
        ),
    ] = "price"
    compensate: Annotated[
        Kind,
        typer.Option(
            help="What to add in place of a whole FFN, fitted to the text; auto: what saves most FLOPs at the quality "
            "budget, which takes longer."
        ),
    ] = "low-rank"
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Rank of --compensate low-rank. Default: a sixth of the stream's width, a third without neurons.",
        ),
    ] = None
    neurons: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="How many of each FFN's own neurons are run beside the map. Default: a sixth of them, where they can "
            "be told apart.",
        ),
    ] = None
    fit_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to fit probe and compensation to.")] = (
        98304
    )
    on: Annotated[
        On,
        typer.Option(
            help="Record on the text, in one fast pass (the default), or on what the model generates from it.",
            show_default=False,
        ),
    ] = "text"
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to calibrate on.")] = 16384
    eval_tokens: EvalTokens = 8192
    sequence_length: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens per sequence.")] = 256
    warm_up: Annotated[
        int | Free,
        count_option(
            "--warm-up",
            0,
            "Generated tokens that run dense before skipping starts; auto: the smallest number that does no harm.",
        ),
    ] = "auto"
    window: Annotated[
        int | Free | None,
        count_option(
            "--window",
            1,
            "With --rule cosine: FFNs skipped after a trigger at most; none: all up to --cold-e.",
            none=True,
        ),
    ] = "auto"
    refresh_every: Annotated[
        int | Free | None, count_option("--refresh-every", 2, "Run every N-th token dense; none: never.", none=True)
    ] = "auto"
    cold_s: Annotated[
        int | None,
        typer.Option(metavar="LAYER", min=0, help="First layer of the skip region. Default: by what is measured."),
    ] = None
    cold_e: Annotated[
        int | None,
        typer.Option(metavar="LAYER", min=1, help="Layer behind the skip region. Default: by what is measured."),
    ] = None
    candidates: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="With --rule cosine: regions, windows and refreshes to try at most; 0: the paper's rule where the "
            "curve is flat.",
        ),
    ] = 16
    seed: Annotated[int, seed_option("Order of the text.")] = 0

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
        whole_ffns = not rule_named(self.rule).leaves_out_parts  # in place of which something may be added
        return whole_ffns and (self.probes or self.compensate != "none")

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
        if self.rule not in rule_names():
            raise FfnskipError(f"There is no rule named {self.rule}: choose from {', '.join(rule_names())}.")
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
            raise FfnskipError(f"--window belongs to --rule cosine: with {self.rule} every layer decides alone.")
        if self.rank is not None and self.compensate != "low-rank":
            raise FfnskipError("--rank belongs to --compensate low-rank.")
        if self.neurons and self.compensate not in ("low-rank", "linear"):
            raise FfnskipError("--neurons belongs to --compensate low-rank or linear.")
        if self.on == "generated" and self.sequence_length != PROMPT_TOKENS + GENERATED_TOKENS:
            raise FfnskipError("With --on generated the --sequence-length is 256: prompts of 128 tokens, then 128 new.")


def recorded_tokens(on: On, sequence_length: int) -> int:
    """Tokens of each sequence that are recorded."""
    return sequence_length if on == "text" else GENERATED_TOKENS
