"""How large the inputs of a model's linear layers are: what says which weights must be kept most exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ffnskip.model.forward import forward
from ffnskip.model.sites import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RANDOM = (8, 32)  # sequences and tokens
_FLOOR = 0.01  # of the mean, below which no input counts: one that was never large may be later


@torch.no_grad()
def mean_squares(model: PreTrainedModel, linears: Sequence[nn.Linear]) -> list[Tensor]:
    """The mean of ``x**2`` of each layer's inputs, ``[in_features]``, relative to the mean of all.

    Of random tokens: those of text tell hardly more (docs/notebook.md). A layer that sees none of them, such as an
    expert that none is sent to, has ones.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, _RANDOM, generator=torch.Generator().manual_seed(0))
    sums = [torch.zeros(linear.in_features, device=linear.weight.device) for linear in linears]
    hooks = [linear.register_forward_pre_hook(_adding_to(s)) for linear, s in zip(linears, sums, strict=True)]
    try:
        forward(model, tokens.to(input_device(model)), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [_relative(total) for total in sums]


def _adding_to(total: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def add(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        total.add_(arguments[0].flatten(0, -2).float().square().sum(dim=0))

    return add


def _relative(total: Tensor) -> Tensor:
    mean = total.mean()
    if not 0 < mean < torch.inf:
        return torch.ones_like(total)
    return total / mean + _FLOOR
