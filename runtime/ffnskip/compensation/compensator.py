"""The tensors of one layer of a profile at work: what its rule reads, and what is added where it skips."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.compensation.kinds import BIAS, DOWN, KINDS, NEURONS
from ffnskip.model.neurons import Neurons
from ffnskip.rules import rule_named

if TYPE_CHECKING:
    from torch import nn

    from ffnskip.profiles.profile import Profile


class Compensator:
    """One layer's probe and ``g``, on the device and in the precision of what they are given.

    Args:
        profile: complete with its weights, if it needs any.
        index: of the layer in the skip region.
        ffn: the layer's FFN module, whose neurons may be used.

    Raises:
        ProfileError: the FFN has no such neurons.
    """

    def __init__(self, profile: Profile, index: int, ffn: nn.Module) -> None:
        weights = {} if profile.weights is None else profile.weights.tensors
        tensors = {name: tensor[index] for name, tensor in weights.items()}
        self._rule, self._kind = rule_named(profile.skip.rule), KINDS[profile.compensation.kind]
        self._neurons = Neurons(ffn, tensors.pop(NEURONS)) if NEURONS in tensors else None
        self._stored = tensors
        self._moved: tuple[tuple[torch.device, torch.dtype] | None, dict[str, Tensor]] = (None, tensors)

    def probe(self, x: Tensor) -> Tensor | None:
        """What the rule reads from the FFN's input ``x [n, hidden]``, ``[n]``; None for one that does not read it."""
        if self._rule.reads != "input":
            return None
        return self._rule.probe(self._near(x), x)

    def added(self, x: Tensor) -> Tensor:
        """``g(x)``, ``[n, hidden]``, or zeros where there is no compensation."""
        if BIAS not in self._stored:
            return torch.zeros_like(x)
        tensors = self._near(x)
        g = self._kind.map(tensors, x)
        return g if self._neurons is None else torch.addmm(g, self._neurons(x), tensors[DOWN].T)

    def _near(self, x: Tensor) -> dict[str, Tensor]:
        """The tensors where the hidden states are; they move the first time and whenever that changes."""
        at, tensors = self._moved
        if at == (x.device, x.dtype):
            return tensors
        with torch.inference_mode(False):  # or a first pass in inference mode would forbid later ones with gradients
            tensors = {  # single numbers, such as a probe's bias, are added in float32
                name: tensor.to(x.device, x.dtype if tensor.dim() else torch.float32)
                for name, tensor in self._stored.items()
            }
            if self._neurons is not None:
                self._neurons.to(x)
        self._moved = (x.device, x.dtype), tensors
        return tensors
