"""Which tokens of a batch were generated.

An engine that batches continuously runs pieces of many requests at once: of one the next chunk of its prompt, of
another its latest token. What is prompt is known by the position alone: a token was generated if it lies behind its
request's prompt. So it does not matter in which chunks a prompt comes, how much of it a cache already holds, or whether
a request was interrupted and its generated tokens run once more.
"""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike
from torch import Tensor


def generated_before(positions: Tensor, prompts: ArrayLike, bounds: ArrayLike) -> tuple[Tensor, Tensor]:
    """How many generated tokens came before each token of a batch.

    Args:
        positions: ``[N]`` integers, where each token is in its request; the last may be padding.
        prompts: ``[requests]``, the length of each prompt.
        bounds: ``[requests + 1]``, where each request's tokens begin, and where the last one's end.

    Returns:
        ``[1, N]`` integers, negative in a prompt; and ``[1, N]`` bool, False on padding: what `Walk.begin` takes.
    """
    lengths = torch.as_tensor(bounds).diff()
    prompt = torch.as_tensor(prompts).repeat_interleave(lengths).to(positions.device)
    index, real = torch.full_like(positions, -1), torch.zeros_like(positions, dtype=torch.bool)
    index[: len(prompt)] = positions[: len(prompt)] - prompt
    real[: len(prompt)] = True
    return index[None], real[None]
