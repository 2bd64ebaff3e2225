"""The rule `cosine`: FFN-SkipLLM's Algorithm 1 (Jaiswal et al., EMNLP 2024).

For one token, walk the layers of the skip region. While the token is not triggered, run the FFN and compare
``cos(h, h + f)`` with the threshold. Once it passes, the token is triggered and the following FFNs are skipped: all up
to ``cold_e``, or ``window`` of them, after which comparing starts again. The state of a token is one integer,
``remaining``: how many of the next FFNs it still skips (0 = not triggered).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ffnskip.rules.base import Rule, SkipSettings, Turn

if TYPE_CHECKING:
    from torch import Tensor


def similarity(h: Tensor, f: Tensor) -> Tensor:
    """``cos(h, h + f)`` over the hidden axis: how little the FFN turns the residual stream.

    Args:
        h: residual stream entering the FFN block, ``[..., hidden]``.
        f: what the block adds to it, ``[..., hidden]``.

    Returns:
        ``[...]`` in [-1, 1]. Computed in float32 at least: near 1, bfloat16 has a resolution of 0.004 only.
    """
    import torch
    import torch.nn.functional as F

    wide = torch.promote_types(h.dtype, torch.float32)
    h = h.to(wide)
    return F.cosine_similarity(h, h + f.to(wide), dim=-1)


def reach(skip: SkipSettings) -> int:
    """How many FFNs one trigger skips at most."""
    whole_region = skip.cold_e - skip.cold_s
    return whole_region if skip.window is None else min(skip.window, whole_region)


class _CosineTurn(Turn):
    def __init__(self, skip: SkipSettings, allowed: Tensor) -> None:
        super().__init__(skip, allowed)
        self._reach = reach(skip)
        self._remaining = allowed.int() * 0

    def skipping(self, layer: int, value: Tensor | None) -> Tensor:
        skipping = self._remaining > 0
        self._remaining = self._remaining - skipping.int()
        return skipping

    def observe(self, layer: int, value: Tensor, ran: Tensor) -> None:
        armed = (value >= self.skip.threshold) & self.allowed
        self._remaining = (armed.int() * self._reach).where(ran, self._remaining)


class Cosine(Rule):
    """SkipSettings what follows an FFN that hardly turned the token's residual stream."""

    name = "cosine"
    reads = "output"
    never = 2.0
    steps = range(-1_001_000, 1_001_001)  # six digits
    has_window = True
    by_similarity = True
    why_fewer = "every token runs at least the FFN that triggers it"
    decides_by = "how little an FFN turns a token"
    axis = "of cos(h, h + FFN(h))"

    def threshold_at(self, step: int) -> float:
        """See `Rule`."""
        return step / 10**6

    def strictness(self, threshold: float) -> float:
        """See `Rule`."""
        return threshold

    def turn(self, skip: SkipSettings, allowed: Tensor) -> Turn:
        """See `Rule`."""
        return _CosineTurn(skip, allowed)

    def measure(self, h: Tensor, f: Tensor) -> Tensor:
        """See `similarity`."""
        return similarity(h, f)

    def check_flops(self, hidden: int, parts: Mapping[str, int] | None = None) -> int:
        """``h + f``, and the three inner products of the cosine."""
        return 7 * hidden

    def looks_at(self, cold_s: int, cold_e: int) -> range:
        """Not at the region's last layer: nothing is left to skip behind it."""
        return range(cold_s, cold_e - 1)

    def can_skip(self, cold_s: int, cold_e: int) -> range:
        """Not the region's first FFN: some FFN must run to trigger."""
        return range(cold_s + 1, cold_e)

    def sentence(self, skip: SkipSettings, layers: str) -> str:
        """See `Rule`."""
        following = {None: "all later FFNs of these layers are", 1: "the next FFN is"}
        skipped = following.get(skip.window, f"the next {skip.window} FFNs of these layers are")
        return (
            f"In {layers}, once a feed-forward block (FFN) turns a token's residual stream so little that "
            f"cos(h, h + FFN(h)) is at least {skip.threshold:g}, {skipped} skipped for this token."
        )
