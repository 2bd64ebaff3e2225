"""What a runtime skipped, in counts that can be added up."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass
class SkipStats:
    """Counts over the forward passes since the last reset. All are numbers of tokens.

    Attributes:
        n_layers: decoder layers of the model.
        tokens: tokens past warm-up.
        warm_up_tokens: tokens of the sequences' warm-up, which ran dense. A decode's prompt counts in neither.
        never_skipped: tokens past warm-up in which no FFN was skipped.
        skipped: per layer, tokens past warm-up whose FFN was skipped.
        checked: per layer, tokens for which the similarity, or the predicted damage, was computed.
        first_skipped: per layer, tokens whose first skipped FFN is this layer's.
        left_out: per layer, what parts that were left out add up to, in whole FFNs.
        attention_flops: FLOPs of attention's projections that were left out.
        least: of a rule that leaves out parts, the smallest share of FFN FLOPs that any token past warm-up left out.
    """

    n_layers: int
    tokens: int = 0
    warm_up_tokens: int = 0
    never_skipped: int = 0
    skipped: list[int] = field(default_factory=list)
    checked: list[int] = field(default_factory=list)
    first_skipped: list[int] = field(default_factory=list)
    left_out: list[float] = field(default_factory=list)
    attention_flops: int = 0
    least: float = 1.0

    def __post_init__(self) -> None:
        self.left_out.extend([0.0] * (self.n_layers - len(self.left_out)))
        for counts in self._per_layer():
            counts.extend([0] * (self.n_layers - len(counts)))

    @property
    def skip_ratio(self) -> float:
        """Skipped FFN blocks / (n_layers x tokens past warm-up); 0 when no token got past warm-up.

        Of a rule that leaves out parts, the share of the FFNs' FLOPs that was left out.
        """
        skipped = sum(self.skipped) + sum(self.left_out)
        return skipped / (self.n_layers * self.tokens) if self.tokens else 0.0

    @property
    def never_skip_fraction(self) -> float:
        """Tokens past warm-up without any skip / tokens past warm-up (the paper's worst case); 1 when there is none."""
        return self.never_skipped / self.tokens if self.tokens else 1.0

    def add(self, other: "SkipStats") -> None:
        """Add other counts to these."""
        self.tokens += other.tokens
        self.warm_up_tokens += other.warm_up_tokens
        self.never_skipped += other.never_skipped
        self.left_out = [a + b for a, b in zip(self.left_out, other.left_out, strict=True)]
        self.attention_flops += other.attention_flops
        self.least = min(self.least, other.least)
        for mine, theirs in zip(self._per_layer(), other._per_layer(), strict=True):
            mine[:] = [a + b for a, b in zip(mine, theirs, strict=True)]

    def add_counts(self, per_layer: Iterable[Sequence[int]], never_skipped: int) -> None:
        """Add what a step counted: `skipped`, `checked` and `first_skipped` of each layer, and `never_skipped`."""
        skipped, checked, first_skipped = map(list, per_layer)
        self.add(SkipStats(self.n_layers, 0, 0, never_skipped, skipped, checked, first_skipped))

    def clear(self) -> None:
        """Start counting anew."""
        self.tokens = self.warm_up_tokens = self.never_skipped = self.attention_flops = 0
        self.left_out, self.least = [0.0] * self.n_layers, 1.0
        for counts in self._per_layer():
            counts[:] = [0] * self.n_layers

    def _per_layer(self) -> tuple[list[int], list[int], list[int]]:
        return self.skipped, self.checked, self.first_skipped
