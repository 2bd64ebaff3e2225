"""The rule `price`: no FFN is skipped as a whole, but every part that is not worth its FLOPs is left out.

A part is one input channel of matrices that read it together (`ffnskip.model.parts`). To leave out channel ``i`` of the
input ``x`` of some matrices moves the model's predictions by ``½ x_i² E[g_i²]`` nats to second order, where ``g_i`` is
the derivative by ``x_i`` of the log-likelihood of labels that the model itself draws: the diagonal of the Fisher
information. Divided by the FLOPs of the channel that is a price, which has one meaning for all layers, kinds of parts
and models. Where ``x_i² c_i``, with ``c_i = ½ E[g_i²] / FLOPs``, is under the threshold, the channel is left out.

Close relatives choose by magnitude alone (TEAL, Liu et al. 2024), or by magnitude and the norm of the weights (WINA).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ffnskip.rules.base import Rule, SkipSettings, Turn

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST = 1e-37  # of `c`: what a channel that never mattered counts as


class _NeverTurn(Turn):
    def skipping(self, layer: int, value: Tensor | None) -> Tensor:
        return self.allowed & ~self.allowed


class Price(Rule):
    """Leave out the inputs whose contribution costs fewer nats per FLOP than the threshold."""

    name = "price"
    unit = "nats per FLOP"
    leaves_out_parts = True
    least = 0.0
    never = 0.0
    steps = range(16_001)  # four digits, from 1 down to 1e-16 nats per FLOP
    decides_by = "what a FLOP of a layer contributes to the predictions"
    axis = "(nats per FLOP)"

    def threshold_at(self, step: int) -> float:
        """See `Rule`."""
        return float(f"{10 ** (-step / 1000):.4g}")

    def strictness(self, threshold: float) -> float:
        """See `Rule`."""
        return -threshold

    def turn(self, skip: SkipSettings, allowed: Tensor) -> Turn:
        """No FFN is skipped as a whole."""
        return _NeverTurn(skip, allowed)

    def tensors(self, hidden: int, parts: Mapping[str, int] | None = None) -> dict[str, tuple[int, ...]]:
        """``c`` by the role of the parts."""
        return {tensor_name(role): (width,) for role, width in (parts or {}).items()}

    def check_flops(self, hidden: int, parts: Mapping[str, int] | None = None) -> int:
        """A product and a comparison for each input."""
        return 2 * sum((parts or {}).values())

    def limit(self, c: Tensor, threshold: float) -> Tensor:
        """The magnitude of an input under which it is left out, ``[width]`` float32, from ``c [width]``."""
        return (threshold / c.float().clamp(min=_SMALLEST)).sqrt()

    def simulate(self, values: Tensor, allowed: Tensor, skip: SkipSettings) -> Tensor:
        """The share of each FFN's FLOPs that is left out.

        Args:
            values: ``[tokens, n_layers, quantiles]``, logarithms of the prices of an FFN's parts; each quantile stands
                for the same share of its FLOPs.
            allowed: ``[tokens]`` bool, from `may_skip`.
            skip: the rule's settings.

        Returns:
            ``[tokens, n_layers]`` float32.
        """
        import math

        bound = math.log(skip.threshold) if skip.threshold > 0 else -math.inf
        share = (values < bound).float().mean(dim=-1) * allowed[:, None]
        share[:, : skip.cold_s] = 0.0
        share[:, skip.cold_e :] = 0.0
        return share

    def sentence(self, skip: SkipSettings, layers: str) -> str:
        """See `Rule`."""
        return (
            f"In {layers}, each input channel of the matrices of attention and feed-forward blocks (FFNs) is left out "
            f"for a token when what it contributes to the predictions is less than {skip.threshold:g} {self.unit}."
        )


def tensor_name(role: str) -> str:
    """Of the tensor with the ``c`` of a role's parts."""
    return f"price.{role}"
