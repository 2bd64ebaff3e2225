"""When to skip: pure functions of tensors.

`cosine` is FFN-SkipLLM's Algorithm 1 (Jaiswal et al., EMNLP 2024). For one token, walk the layers of the skip region.
While the token is not triggered, run the FFN and compare ``cos(h, h + f)`` with the threshold. Once it passes, the
token is triggered and the following FFNs are skipped: all up to ``cold_e``, or ``window`` of them, after which
comparing starts again. The state of a token is one integer, ``remaining``: how many of the next FFNs it still skips
(0 = not triggered). The runtime, which meets one layer at a time, and `simulate`, which has every similarity at hand,
share `arm`.

`predicted-damage` has no state: a layer is skipped where the damage in nats that is predicted from the FFN's own input
is under the threshold (docs/predicted-damage.md).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ffnskip.sections import Skip


def similarity(h: Tensor, f: Tensor) -> Tensor:
    """``cos(h, h + f)`` over the hidden axis: how little the FFN turns the residual stream.

    Args:
        h: residual stream entering the FFN block, ``[..., hidden]``.
        f: what the block adds to it, ``[..., hidden]``.

    Returns:
        ``[...]`` in [-1, 1]. Computed in float32 at least: near 1, bfloat16 has a resolution of 0.004 only.
    """
    wide = torch.promote_types(h.dtype, torch.float32)
    h = h.to(wide)
    return F.cosine_similarity(h, h + f.to(wide), dim=-1)


def may_skip(index: Tensor, skip: Skip) -> Tensor:
    """Which tokens the rule applies to at all: those past warm-up that `refresh_every` does not run dense.

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


def reach(skip: Skip) -> int:
    """How many FFNs one trigger skips at most."""
    whole_region = skip.cold_e - skip.cold_s
    return whole_region if skip.window is None else min(skip.window, whole_region)


def arm(similarity: Tensor, threshold: float, reach: int) -> Tensor:
    """The new ``remaining`` of tokens whose FFN has just run: ``reach`` where the rule fires, else 0. ``[...]`` int."""
    return (similarity >= threshold).to(torch.int32) * reach


def harmless(score: Tensor, threshold: float) -> Tensor:
    """Where the rule `predicted-damage` skips: ``score [...]``, log nats, is under the threshold's. ``[...]`` bool."""
    return score < (math.log(threshold) if threshold > 0 else -math.inf)


def simulate(values: Tensor, allowed: Tensor, skip: Skip) -> Tensor:
    """The decisions that a rule takes on recorded values.

    Exact for each token taken alone. In a running model a skip also changes the values of later layers and tokens, so
    what a threshold really does is measured by `ffnskip_cli.calibration.verify`.

    Args:
        values: similarities, or for `predicted-damage` the scores, ``[tokens, n_layers]``.
        allowed: ``[tokens]`` bool, from `may_skip`.
        skip: the rule's settings.

    Returns:
        ``[tokens, n_layers]`` bool: True where the FFN is skipped.
    """
    skipped = torch.zeros_like(values, dtype=torch.bool)
    if skip.rule == "predicted-damage":
        region = slice(skip.cold_s, skip.cold_e)
        skipped[:, region] = harmless(values[:, region], skip.threshold) & allowed[:, None]
        return skipped
    remaining = torch.zeros(values.shape[0], dtype=torch.int32, device=values.device)
    for layer in range(skip.cold_s, skip.cold_e):
        skipped[:, layer] = remaining > 0
        armed = arm(values[:, layer], skip.threshold, reach(skip)) * allowed
        remaining = torch.where(skipped[:, layer], remaining - 1, armed)
    return skipped
