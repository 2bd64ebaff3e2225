"""Tokens that skip nothing, by the length of the text and by the position in it: the paper's Table 6.

Such a token costs more than without a profile, and it is what the slowest decode is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from ffnskip.decoder import Decoder
from ffnskip.fast.step import MAX_BATCH
from ffnskip.stats import SkipStats
from ffnskip_cli.progress import Track


def never_skipping(decoder: Decoder, prompts: Tensor, lengths: Sequence[int], track: Track) -> list[dict[str, Any]]:
    """Continue the prompts greedily, past any end of text, and count.

    Args:
        decoder: with a profile.
        prompts: ``[prompts, length]``, of which so many are decoded side by side as a fused step takes.
        lengths: numbers of generated tokens, rising.
        track: shows progress.

    Returns:
        A row for each length: `length`, `never_skip_fraction` of all tokens past warm-up up to it, the same `from` the
        length before on as `never_skip_fraction_here`, and `skip_ratio`; what no token past warm-up stands for is None.
    """
    n_layers = decoder.stats.n_layers
    counted = [SkipStats(n_layers) for _ in range(len(lengths) + 1)]  # up to each length, from 0 on
    for batch in prompts.split(MAX_BATCH):
        decoder.reset_stats()
        steps = decoder.decode(batch, max_new_tokens=lengths[-1])
        for generated, _ in enumerate(track(steps, f"generating {lengths[-1]} tokens", lengths[-1]), start=1):
            if generated in lengths[:-1]:
                counted[1 + lengths.index(generated)].add(decoder.stats)
        counted[-1].add(decoder.stats)  # what the last step counted is known when the decode has ended
    rows = []
    for (start, length), (before, now) in zip(pairwise((0, *lengths)), pairwise(counted), strict=True):
        tokens = now.tokens - before.tokens
        rows.append(
            {
                "from": start,
                "length": length,
                "tokens": now.tokens,
                "never_skip_fraction": now.never_skip_fraction if now.tokens else None,
                "never_skip_fraction_here": (now.never_skipped - before.never_skipped) / tokens if tokens else None,
                "skip_ratio": now.skip_ratio if now.tokens else None,
            }
        )
    return rows
