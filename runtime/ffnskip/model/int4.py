"""Matrices of 4 bits: how their numbers are chosen, and how they lie in bytes.

32 numbers of a row share a factor and an offset in float16, as in the Q4_1 of GGUF; each is ``factor * level + offset``
with a level from 0 to 15. Two levels share a byte: of two columns where products read rows, and of two rows where they
read only some of the columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32  # columns that share a scale
ROWS = 64  # that share a stretch of bytes, where two rows share a byte
_SPANS = (1.0, 0.9)  # of a group's numbers, that sixteen levels are first spread over
_REFITS = 2
_LEAST, _MOST = 2.0**-24, 65504.0  # factor of a group: what float16 holds


def narrow(rows: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """`Matrix.data` and `Matrix.scale` of some numbers ``[rows, columns]``; each column counts by its importance."""
    groups = rows.unflatten(1, (-1, GROUP))
    shares = importance.view(-1, GROUP)
    shares = shares / shares.sum(dim=1, keepdim=True)
    fits = [_fit(groups, shares, span) for span in _SPANS]
    best = torch.stack([_error(groups, shares, *fit) for fit in fits]).argmin(dim=0)
    factor, offset = (torch.stack(tensors).gather(0, best[None])[0] for tensors in zip(*fits, strict=True))
    levels = _levels(groups, factor, offset).to(torch.uint8).flatten(1)
    return join(levels), torch.cat([factor, offset], dim=2).half()


def wide(data: Tensor, scale: Tensor, by_input: bool = False) -> Tensor:
    """The numbers ``[rows, columns]`` in float32."""
    factor, offset = scale.float()[..., None].unbind(2)
    groups: Tensor = split(data, by_input).unflatten(1, (-1, GROUP)).float()
    return groups.mul_(factor).add_(offset).flatten(1)


def join(levels: Tensor, by_input: bool = False) -> Tensor:
    """Levels ``[rows, columns]`` two to a byte: ``[rows, columns / 2]``, or ``[rows / 2, columns]`` by input.

    Byte k of 32 columns holds numbers k and k + 16, the first in its low half; by input, byte k of 64 rows holds
    numbers k and k + 32.
    """
    dim, size = (0, ROWS) if by_input else (1, GROUP)
    halves: Tensor = levels.unflatten(dim, (-1, 2, size // 2))
    low, high = halves.unbind(dim + 1)
    return (low | high << 4).flatten(dim, dim + 1)


def split(data: Tensor, by_input: bool = False) -> Tensor:
    """What `join` has joined."""
    dim, size = (0, ROWS) if by_input else (1, GROUP)
    halves: Tensor = data.unflatten(dim, (-1, size // 2))
    return torch.stack([halves & 15, halves >> 4], dim=dim + 1).flatten(dim, dim + 2)


def _fit(groups: Tensor, shares: Tensor, span: float) -> tuple[Tensor, Tensor]:
    """Factor and offset ``[rows, n, 1]`` of ``groups [rows, n, 32]``, numbers of float16 whose errors are small.

    Least squares given the levels that each number is nearest to, and these given the fit, in turns (Lloyd 1982). A
    number counts by its share in ``shares [n, 32]``, which sum to one in each group.
    """
    lowest, highest = groups.aminmax(dim=2, keepdim=True)
    factor = ((highest - lowest) * (span / 15)).clamp(_LEAST, _MOST)
    offset = (highest + lowest) / 2 - 7.5 * factor
    mean = (shares * groups).sum(dim=2, keepdim=True)
    for _ in range(_REFITS):
        levels = _levels(groups, factor, offset)
        weighted = shares * levels
        level = weighted.sum(dim=2, keepdim=True)
        variance = (weighted * levels).sum(dim=2, keepdim=True) - level**2
        covariance = (weighted * groups).sum(dim=2, keepdim=True) - level * mean
        factor = torch.where(variance > 1e-4, covariance / variance, factor).clamp(_LEAST, _MOST).half().float()
        offset = mean - factor * level
    return factor, offset.clamp(-_MOST, _MOST).half().float()


def _levels(groups: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """The whole numbers from 0 to 15 by which a group comes closest."""
    return ((groups - offset) / factor).round_().clamp_(0, 15)


def _error(groups: Tensor, shares: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """Mean squared error of each group, ``[rows, n, 1]``."""
    error = _levels(groups, factor, offset) * factor + offset - groups
    return (shares * error**2).sum(dim=2, keepdim=True)
