"""What a fused step relies on and anybody may change: a model's hooks, its `forward` methods and its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING
from weakref import ref

import torch
from torch import Tensor, nn

from ffnskip.pages import settled

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def altered(model: PreTrainedModel) -> str | None:
    """Why a pass of the model does more than its modules say, in one sentence; None where it does not.

    Hooks and replaced methods run in the model's own forward pass alone, so a fused step would leave them out.
    """
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return "There is a forward hook on all modules, which a fused decode step would not run."
    for name, module in model.named_modules():
        where = f"on {name}" if name else "on the model"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"There is a forward hook {where}, which a fused decode step would not run."
        if "forward" in vars(module):
            return f"The forward method was replaced {where}, and a fused decode step would not call it."
    return None


def traces(model: PreTrainedModel) -> list[tuple[str, set[int], int]]:
    """The hooks and replaced methods of a model as they are now, to notice later that others have come or gone."""
    everywhere = torch.nn.modules.module
    hooks = {*map(id, everywhere._global_forward_hooks.values())}
    hooks |= {*map(id, everywhere._global_forward_pre_hooks.values())}
    return [("", hooks, 0)] + [
        (name, {*map(id, module._forward_hooks.values()), *map(id, module._forward_pre_hooks.values())}, id(forward))
        for name, module in model.named_modules()
        for forward in [vars(module).get("forward")]
        if module._forward_hooks or module._forward_pre_hooks or forward is not None
    ]


class Pulse:
    """How many hooks there are, and how often weights were written to: what is cheap enough to look at for each token.

    Writes through ``tensor.data`` leave no trace, here or in `Weights`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        modules = list(model.modules())
        self._hooks = [*(m._forward_hooks for m in modules), *(m._forward_pre_hooks for m in modules)]
        self._hooks += [
            torch.nn.modules.module._global_forward_hooks,
            torch.nn.modules.module._global_forward_pre_hooks,
        ]
        self._weights = [weight for weight in model.parameters() if not weight.is_inference()]
        self._seen = self._now()

    @property
    def changed(self) -> bool:
        """Whether either is another now."""
        return self._now() != self._seen

    def _now(self) -> tuple[int, int]:
        return sum(map(len, self._hooks)), sum([weight._version for weight in self._weights])


class Weights:
    """The parameters and packed matrices of a model as they are now, to notice later that they have changed.

    Rotary frequencies are left out: some models change them with the length of what they read, and steps have tables of
    their own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._seen = {name: (ref(tensor), _state(tensor), tensor.data_ptr()) for name, tensor in _tensors(model)}

    @property
    def changed(self) -> bool:
        """Whether any was replaced, written to, converted or moved.

        A move by another decoder, which lays the same numbers out otherwise, is none: a step holds on to its own.
        """
        now = dict(_tensors(self._model))
        return now.keys() != self._seen.keys() or any(
            seen() is not now[name]
            or state != _state(now[name])
            or (address != now[name].data_ptr() and not settled(now[name]))
            for name, (seen, state, address) in self._seen.items()
        )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if "rotary" not in name:
            yield name, buffer


def _state(tensor: Tensor) -> tuple[torch.dtype, torch.device, int]:
    return tensor.dtype, tensor.device, 0 if tensor.is_inference() else tensor._version
