"""What a rule is: one object that says when an FFN is skipped.

A rule takes one decision per token and layer. It goes by a *value*, one number per token and layer: read from the FFN's
own input before it would run, or from what the FFN did, for the layers that follow. A `Turn` makes decisions of the
values of one forward pass; the runtime, which meets one layer at a time, and `simulate`, which has every value at hand,
share it. docs/adding-a-rule.md adds one.

Nothing here imports torch before it is needed: to read a profile takes none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Reads = Literal["input", "output", "nothing"]


class SkipSettings(Protocol):
    """The settings of a rule: what it needs of `ffnskip.profiles.schema.Skip`, where each is described."""

    @property
    def cold_s(self) -> int: ...  # noqa: D102
    @property
    def cold_e(self) -> int: ...  # noqa: D102
    @property
    def threshold(self) -> float: ...  # noqa: D102
    @property
    def warm_up(self) -> int: ...  # noqa: D102
    @property
    def window(self) -> int | None: ...  # noqa: D102
    @property
    def refresh_every(self) -> int | None: ...  # noqa: D102


class Turn(ABC):
    """The decisions of one forward pass over ``N`` tokens.

    Args:
        skip: the rule's settings.
        allowed: ``[N]`` bool, the tokens that the rule applies to at all (`may_skip`).
    """

    def __init__(self, skip: SkipSettings, allowed: Tensor) -> None:
        self.skip = skip
        self.allowed = allowed

    @abstractmethod
    def skipping(self, layer: int, value: Tensor | None) -> Tensor:
        """Which of the allowed tokens skip this layer's FFN, ``[N]`` bool. Asked once per layer, in order.

        Args:
            layer: whose FFN it is.
            value: ``[N]``, of a rule that reads the input; in a simulation of any rule.
        """

    def observe(self, layer: int, value: Tensor, ran: Tensor) -> None:  # noqa: B027 - most rules need not look back
        """Take in what the FFNs that ran did, for a rule that reads the output.

        Args:
            layer: whose FFNs they are.
            value: ``[N]``, undefined where the FFN did not run.
            ran: ``[N]`` bool.
        """

    def to(self, device: object) -> None:
        """Follow the hidden states when the layers of a model lie on several devices."""
        for name, value in vars(self).items():
            if hasattr(value, "device"):
                setattr(self, name, value.to(device))


class Rule(ABC):
    """When to skip.

    Attributes:
        name: as in the profile's `skip.rule`.
        unit: of the threshold, as it stands behind the number; empty for a pure number.
        reads: what the value is read from: the FFN's `input`, its `output`, or `nothing`.
        least: the smallest threshold that has a meaning.
        never: a threshold at which the rule runs and nothing is skipped.
        steps: thresholds as whole steps, from one that every value passes to one that none does; see `threshold_at`.
        leaves_out_parts: whether it leaves out parts of FFNs and attention, not whole FFNs (`ffnskip.rules.price`).
        has_window: whether `skip.window` bounds what one decision skips.
        by_similarity: whether the value is ``cos(h, h + f)``, whose mean over the text is a profile's `similarity`.
        why_fewer: why some FFN of every skip region runs for every token, as a clause; empty where all can be skipped.
        decides_by: what a threshold is a threshold of, in words.
        axis: the same for the axis of a picture, with its formula or unit.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = ""
    reads: ClassVar[Reads] = "nothing"
    least: ClassVar[float] = float("-inf")
    never: ClassVar[float]
    steps: ClassVar[range]
    leaves_out_parts: ClassVar[bool] = False
    has_window: ClassVar[bool] = False
    by_similarity: ClassVar[bool] = False
    why_fewer: ClassVar[str] = ""
    decides_by: ClassVar[str]
    axis: ClassVar[str] = ""

    @abstractmethod
    def threshold_at(self, step: int) -> float:
        """The threshold of one of `steps`; the higher the step, the less is skipped."""

    @abstractmethod
    def strictness(self, threshold: float) -> float:
        """A number that is higher for a threshold that skips less."""

    @abstractmethod
    def turn(self, skip: SkipSettings, allowed: Tensor) -> Turn:
        """Start a forward pass; see `Turn`."""

    @abstractmethod
    def sentence(self, skip: SkipSettings, layers: str) -> str:
        """What the rule does in these `layers`, in words, for an engineer who did not read the paper."""

    def bound(self, threshold: float) -> float:
        """What a value is compared with; a value may be on another scale than the threshold."""
        return threshold

    def measure(self, h: Tensor, f: Tensor) -> Tensor:
        """The value ``[...]`` of a rule that reads the output, from ``h`` and ``f [..., hidden]``."""
        raise NotImplementedError

    def probe(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The value ``[n]`` of a rule that reads the input, from its `tensors` of one layer and ``x [n, hidden]``."""
        raise NotImplementedError

    def tensors(self, hidden: int, parts: Mapping[str, int] | None = None) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that one layer's decisions need, by name.

        Args:
            hidden: width of the stream.
            parts: how many parts of each role a layer has, for a rule that leaves out parts.
        """
        return {}

    def check_flops(self, hidden: int, parts: Mapping[str, int] | None = None) -> int:
        """FLOPs of one value, or of looking at all parts of a layer."""
        return 0

    def check_weights(self, hidden: int, parts: Mapping[str, int] | None = None) -> int:
        """Weights that are read for that."""
        return sum(shape[0] for shape in self.tensors(hidden, parts).values() if shape)

    def looks_at(self, cold_s: int, cold_e: int) -> range:
        """The layers of a skip region in which a value is read."""
        return range(cold_s, cold_e)

    def can_skip(self, cold_s: int, cold_e: int) -> range:
        """The layers of a skip region whose FFN can be skipped."""
        return range(cold_s, cold_e)

    def refuse(self, skip: SkipSettings) -> None:
        """Raise ValueError, in words that follow a colon, for settings that the rule cannot have."""
        if skip.threshold < self.least:
            raise ValueError(f"the threshold of {self.name} is a number of {self.unit} and not negative")
        if skip.window is not None and not self.has_window:
            raise ValueError(f"window belongs to the rule cosine; with {self.name} it is null")

    def simulate(self, values: Tensor, allowed: Tensor, skip: SkipSettings) -> Tensor:
        """The decisions that the rule takes on recorded values.

        Exact for each token taken alone. In a running model a skip also changes the values of later layers and tokens,
        so what a threshold really does is measured by `ffnskip_cli.calibration.threshold.verify`.

        Args:
            values: ``[tokens, n_layers]``.
            allowed: ``[tokens]`` bool, from `may_skip`.
            skip: the rule's settings.

        Returns:
            ``[tokens, n_layers]``: True where the FFN is skipped, or the share of its FLOPs that is left out.
        """
        skipped = values.new_zeros(values.shape, dtype=allowed.dtype)
        turn = self.turn(skip, allowed)
        for layer in range(skip.cold_s, skip.cold_e):
            skipped[:, layer] = decided = turn.skipping(layer, values[:, layer])
            turn.observe(layer, values[:, layer], ~decided)
        return skipped


def may_skip(index: Tensor, skip: SkipSettings) -> Tensor:
    """Which tokens a rule applies to at all: those past warm-up that `refresh_every` does not run dense.

    Args:
        index: ``[...]`` integers: how many tokens of the sequence came before, counted from the first generated one in
            decode mode and from the first of all in score mode.
        skip: the profile's settings.

    Returns:
        ``[...]`` bool.
    """
    past = index - skip.warm_up
    allowed = past >= 0
    if skip.refresh_every is not None:
        allowed &= (past + 1) % skip.refresh_every != 0
    return allowed
