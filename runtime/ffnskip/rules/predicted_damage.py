"""The rule `predicted-damage`: every layer decides alone, by what skipping its FFN is predicted to cost.

A probe on the FFN's own input predicts the logarithm of the damage in nats that is done to the model's predictions when
this token's FFN is replaced by its compensation; where that is under the threshold, it is (docs/predicted-damage.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ffnskip.rules.base import Rule, SkipSettings, Turn

if TYPE_CHECKING:
    from torch import Tensor

PROBE, PROBE_BIAS = "probe.weight", "probe.bias"


class _DamageTurn(Turn):
    def skipping(self, layer: int, value: Tensor | None) -> Tensor:
        assert value is not None, "the rule has no probe"
        return (value < PredictedDamage().bound(self.skip.threshold)) & self.allowed


class PredictedDamage(Rule):
    """SkipSettings where a probe predicts that this does less than so many nats of damage."""

    name = "predicted-damage"
    unit = "nats"
    reads = "input"
    least = 0.0
    never = 0.0
    steps = range(-115_000, 207_001)  # five digits, from 1e5 down to 1e-9 nats
    decides_by = "the damage that skipping an FFN is predicted to do"
    axis = "of the predicted damage (nats per skipped FFN)"

    def threshold_at(self, step: int) -> float:
        """See `Rule`."""
        return float(f"{math.exp(-step / 10**4):.5g}")

    def strictness(self, threshold: float) -> float:
        """See `Rule`."""
        return -threshold

    def bound(self, threshold: float) -> float:
        """In log nats, as the probes answer."""
        return math.log(threshold) if threshold > 0 else -math.inf

    def turn(self, skip: SkipSettings, allowed: Tensor) -> Turn:
        """See `Rule`."""
        return _DamageTurn(skip, allowed)

    def probe(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Predicted damage in log nats, ``[n]`` float32."""
        import torch.nn.functional as F

        # The bias goes on top in float32: the product alone is near 0, where bfloat16 is fine enough.
        return F.linear(x, tensors[PROBE][None])[:, 0].float() + tensors[PROBE_BIAS]

    def tensors(self, hidden: int, parts: Mapping[str, int] | None = None) -> dict[str, tuple[int, ...]]:
        """See `Rule`."""
        return {PROBE: (hidden,), PROBE_BIAS: ()}

    def check_flops(self, hidden: int, parts: Mapping[str, int] | None = None) -> int:
        """One inner product."""
        return 2 * hidden

    def sentence(self, skip: SkipSettings, layers: str) -> str:
        """See `Rule`."""
        return (
            f"In {layers}, each feed-forward block (FFN) is skipped for a token when a probe on the FFN's own input "
            f"predicts that this does less than {skip.threshold:g} {self.unit} of damage."
        )
