"""The sections of a skip profile that say where it comes from: its texts, the search, the fit, what was measured."""

from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ffnskip.profiles.schema import (
    Cosines,
    Count,
    Hex64,
    Name,
    NotNegative,
    Positive,
    Ratio,
    Section,
    Shares,
    Text,
    Word,
    printable,
    sort_keys,
)


def _a_list(point: object) -> object:
    if not isinstance(point, (list, tuple)):
        raise ValueError("must be a list of threshold, skip_ratio and kl")
    return point


class NamedText(Section):
    """A text by its name and its content."""

    dataset: Name
    """Name of the dataset: a word or `org/name`, or the bare name of a local file; never a path. A `mixture` of several
    has them as its parts."""
    config: Text | None
    """Configuration of the dataset, if it has several."""
    split: Text | None
    """Split of the dataset."""
    revision: Text | None
    """Revision of the dataset repository, or null."""
    text_sha256: Hex64
    """SHA-256 of the text that was used, 64 hex digits."""


class TextPart(NamedText):
    """One text of a mixture."""

    weight: Annotated[float, Field(gt=0)]
    """Its share of the tokens asked for is its weight by the sum of all weights."""
    tokens_used: Count
    """Tokens that it yielded."""


class EvaluationText(NamedText):
    """The text that quality was measured on."""

    tokens_requested: Count
    """Tokens asked for."""
    tokens_used: Count
    """Tokens that the text yielded."""
    sequence_length: Positive
    """Tokens per sequence."""
    parts: Annotated[tuple[TextPart, ...], Field(strict=False, max_length=100)] = ()
    """The texts of a mixture; empty for a single text."""

    @property
    def fell_short(self) -> bool:
        """Whether the text had fewer whole sequences than were asked for."""
        return self.tokens_used < self.tokens_requested // self.sequence_length * self.sequence_length


class CalibrationText(EvaluationText):
    """The text that the similarities were recorded on, and how."""

    seed: Count
    """Seed of the random generator."""
    dtype: Word
    """Precision of the model while calibrating, such as `bfloat16`."""
    on: Literal["text", "generated"]
    """Whether the tokens came from the text or from the model's own generation."""


class TriedCompensation(Section):
    """A compensation that `--compensate auto` tried, fitted to the dense model only."""

    kind: Literal["mean", "linear", "low-rank"]
    """As in `compensation`."""
    rank: Positive | None
    """As in `compensation`."""
    neurons: Count
    """As in `compensation`."""
    skip_ratio: Ratio
    """What it could skip within the quality budget, on the text that was held back."""
    flops_saved: Annotated[float, Field(le=1)]
    """What of a token's FLOPs that would save, the compensation's and the probes' charged."""


class Fit(Section):
    """How probe and compensation were fitted."""

    tokens: Count
    """Tokens of the calibration text's datasets that they were fitted to."""
    text_sha256: Hex64
    """SHA-256 of the text that was used, 64 hex digits."""
    gradient_tokens: Count
    """Tokens that gradients were taken of."""
    ridge: NotNegative
    """Penalty of the least squares, relative to each regressor's own size."""
    ratio: Ratio
    """The skip_ratio at which the loop was closed."""
    kl: Annotated[tuple[float, ...], Field(strict=False, max_length=100)]
    """Mean KL divergence at that ratio on text that was held back, nats per token: after the fit to the dense model and
    after each refit to the skipping one. The best was kept."""
    tried: Annotated[tuple[TriedCompensation, ...], Field(strict=False, max_length=100)] = ()
    """The compensations that the profile's was chosen from, if it was."""


class SimilarityCurve(Section):
    """Similarity cos(h, h + f) per layer of the dense model, one value for each layer."""

    mean: Cosines
    """Mean over tokens."""
    low: Cosines
    """10th percentile over tokens."""
    high: Cosines
    """90th percentile over tokens."""


class Candidate(Section):
    """A rule that was tried on the calibration text."""

    cold_s: Count
    """First layer of its skip region."""
    cold_e: Count
    """End of its skip region (exclusive)."""
    window: Positive | None
    """Most FFNs skipped after a trigger; null: all up to cold_e."""
    refresh_every: Count | None
    """Every n-th token runs dense; null: never."""
    kl: float
    """Mean KL divergence from the dense model at the search's ratio, nats per token."""
    standard_error: NotNegative
    """Of the difference between this kl and the chosen candidate's, paired by sequence."""


class WarmUpTrial(Section):
    """A warm-up that was tried on text that the dense model wrote."""

    warm_up: Count
    """Generated tokens that ran dense."""
    kl: float
    """Mean KL divergence along the dense model's own continuations, over their second half."""
    standard_error: NotNegative
    """Of the difference between this kl and the lowest one, paired by sequence."""
    repetition: Ratio
    """Share of repeated 4-grams in what the model writes with this warm-up."""


class Search(Section):
    """What was tried before the rule's settings were chosen."""

    ratio: Ratio
    """The skip_ratio at which the candidates were compared."""
    tokens: Count
    """Calibration tokens that each candidate was scored on."""
    candidates: Annotated[tuple[Candidate, ...], Field(strict=False, max_length=1000)] = ()
    """Regions, windows and refreshes; empty when they were given."""
    warm_up: Annotated[tuple[WarmUpTrial, ...], Field(strict=False, max_length=1000)] = ()
    """Warm-ups; empty when it was given."""


class Measured(Section):
    """What the profile saved and cost on the evaluation text."""

    target_ratio: Ratio | None = None
    """The skip_ratio that was asked for, or null."""
    target_flops: Ratio | None = None
    """The flops_saved_past_warm_up that was asked for, or null."""
    max_kl: NotNegative | None = None
    """The limit on kl that was asked for, or null."""
    max_perplexity_increase: NotNegative | None = None
    """The limit on perplexity / perplexity_dense - 1 that was asked for, or null."""
    skip_ratio: Ratio
    """Skipped FFNs / (layers x tokens past warm-up); of the rule price, the share of FFN FLOPs that was left out."""
    flops_saved: Annotated[float, Field(le=1)]
    """Fraction of the dense decode's FLOPs that was saved, all overhead charged; negative if it cost more."""
    flops_saved_past_warm_up: Annotated[float, Field(le=1)] | None = None
    """The same of the tokens past warm-up alone."""
    least_skipped: Ratio | None = None
    """Of all tokens past warm-up, the smallest share of their FFNs' FLOPs that was left out; null for whole FFNs."""
    never_skip_fraction: Ratio
    """Tokens past warm-up in which no FFN was skipped / tokens past warm-up."""
    perplexity_dense: NotNegative
    """Perplexity of the dense model."""
    perplexity: NotNegative
    """Perplexity with the profile."""
    kl: float
    """Mean KL divergence of the profile's predictions from the dense model's, nats per token."""
    top1_agreement: Ratio
    """Fraction of tokens at which both models rank the same token first."""
    tokens: Count
    """Tokens that the figures are taken over."""
    standard_error: Annotated[dict[Word, NotNegative], AfterValidator(sort_keys)]
    """Standard error of a figure, by the name of its field."""
    verdict: Annotated[str, Field(max_length=300), AfterValidator(printable)]
    """One sentence that says whether the profile is worth using."""
    within_budget: bool
    """Whether kl and top1_agreement are within the quality budget that the verdict states."""
    first_skipped: Shares | None = None
    """Share of tokens whose first skipped FFN is this layer's, one value per layer."""

    @property
    def goal(self) -> str:
        """What was asked for, in words."""
        if self.max_kl is not None:
            return f"KL at most {self.max_kl:g}"
        if self.max_perplexity_increase is not None:
            return f"perplexity at most {100 * self.max_perplexity_increase:g}% up"
        if self.target_flops is not None:
            return f"FLOPs {self.target_flops:g}"
        return f"ratio {self.target_ratio:g}"

    @model_validator(mode="after")
    def _one_goal(self) -> "Measured":
        goals = (self.target_ratio, self.target_flops, self.max_kl, self.max_perplexity_increase)
        if sum(goal is not None for goal in goals) != 1:
            raise ValueError("give exactly one of target_ratio, target_flops, max_kl and max_perplexity_increase")
        return self


class CurvePoint(NamedTuple):
    """Threshold, the skip_ratio it gives, and the KL divergence in nats per token it costs."""

    threshold: float
    skip_ratio: Annotated[float, Field(ge=0, le=1)]
    kl: float


Curve = Annotated[tuple[Annotated[CurvePoint, BeforeValidator(_a_list)], ...], Field(strict=False, max_length=1000)]
