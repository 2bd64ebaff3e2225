"""What a calibration aims for, and the options that say so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ffnskip.errors import FfnskipError

if TYPE_CHECKING:
    from ffnskip_cli.measure.quality import Quality


@dataclass(frozen=True)
class Goal:
    """What a profile is to reach: a saving, or the largest one that stays within a limit on what it costs.

    Attributes:
        kind: the field of `ffnskip.profiles.evidence.Measured` that records it.
        value: the skip_ratio; the share of all FLOPs past warm-up; the limit on KL in nats per token; the limit on
            perplexity / perplexity_dense - 1.
    """

    kind: Literal["target_ratio", "target_flops", "max_kl", "max_perplexity_increase"]
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


_NOUNS = {
    "--target": "a ratio",
    "--target-flops": "a share",
    "--max-kl": "a limit",
    "--max-perplexity-increase": "a limit",
}


@dataclass(frozen=True)
class GoalOptions:
    """The options of which exactly one says what to compile profiles for."""

    target: Annotated[
        str | None,
        typer.Option(
            metavar="RATIO[,RATIO…]",
            help="Share of all FFNs to skip on the calibration text, such as 0.10; several share one run.",
        ),
    ] = None
    target_flops: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE[,SHARE…]",
            help="Instead of --target: share of all FLOPs past warm-up to save, attention and output head included.",
        ),
    ] = None
    max_kl: Annotated[
        str | None,
        typer.Option(
            "--max-kl",
            metavar="X[,X…]",
            help="Instead of --target: skip as much as keeps the KL from the dense model within X nats per token.",
        ),
    ] = None
    max_perplexity_increase: Annotated[
        str | None,
        typer.Option(
            metavar="X%[,X%…]",
            help="Instead of --target: skip as much as keeps the perplexity within X% above the dense model's.",
        ),
    ] = None

    def parse(self) -> tuple[Goal, ...]:
        """One goal for each number; raises FfnskipError unless exactly one option holds such numbers."""
        texts = {
            "--target": self.target,
            "--target-flops": self.target_flops,
            "--max-kl": self.max_kl,
            "--max-perplexity-increase": self.max_perplexity_increase,
        }
        if len(chosen := {option: text for option, text in texts.items() if text is not None}) != 1:
            raise FfnskipError(f"Say what to aim for with exactly one of {', '.join(texts)}; --target 0.10 is a start.")
        (option, text), *_ = chosen.items()
        values = _numbers(option, text)
        if len(set(values)) < len(values):
            raise FfnskipError(f"{option} {text} names {_NOUNS[option]} twice.")
        match option:
            case "--target":
                return tuple(Goal("target_ratio", value) for value in values)
            case "--target-flops":
                return tuple(Goal("target_flops", value) for value in values)
            case "--max-kl":
                return tuple(Goal("max_kl", value) for value in values)
            case _:
                return tuple(Goal("max_perplexity_increase", value) for value in values)


def _numbers(option: str, text: str) -> list[float]:
    """The numbers between the commas; a perplexity's are per cent."""
    examples = {
        "--target": "a ratio such as 0.10",
        "--target-flops": "a share such as 0.15",
        "--max-kl": "a limit such as 0.05",
    }
    if option in examples and "%" in text:
        raise FfnskipError(f"{option} {text} is not {examples[option]}: leave the % out.")
    try:
        numbers = [float(part.removesuffix("%")) for part in text.split(",")]
    except ValueError:
        example = examples.get(option, "a limit such as 2%")
        raise FfnskipError(f"{option} {text} is not {example}, or several with commas between.") from None
    if option in examples:
        return numbers
    if text.count("%") < len(numbers):
        raise FfnskipError(f"{option} {text} lacks its unit: write 2% for two per cent.")
    return [number / 100 for number in numbers]
