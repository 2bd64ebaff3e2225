"""Leave out parts on any model: zero the inputs of its matrices, which computes the same function and saves no time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ffnskip.general.walk import Walk
from ffnskip.model.parts import FFN_ROLES, Part, parts_of
from ffnskip.rules.price import Price, tensor_name

if TYPE_CHECKING:
    from ffnskip.model.sites import FFNSite
    from ffnskip.profiles.profile import Profile


class ThinnedInput:
    """A forward pre-hook of matrices that share an input: those of its channels that are not worth it become zero.

    Args:
        part: the matrices.
        share: what all of its channels are of the FFN's FLOPs; 0 for attention's.
        limit: magnitude under which a channel is left out, ``[width]`` float32.
        index: of the layer.
        walk: tells which tokens the rule applies to, and counts.
    """

    def __init__(self, part: Part, share: float, limit: Tensor, index: int, walk: Walk) -> None:
        self._part, self._share, self._limit, self._index, self._walk = part, share, limit, index, walk

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Replace the input ``[..., width]``."""
        x, *others = args
        if not self._walk.active:
            return None
        scratch = self._walk.scratch
        latest, thinned, readers = scratch.get(self, (None, None, 0))
        if latest is not x:
            thinned, readers = self._thinned(x), 0
        assert thinned is not None
        scratch[self] = x, thinned, readers + 1
        if readers + 1 == len(self._part.matrices):  # hold no activations longer than the layer does
            scratch.pop(self)
        return (thinned, *others)

    def _thinned(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        self._limit = self._limit.to(x.device)
        leave_out = (flat.abs().float() < self._limit) & self._walk.allowed(x.device)[:, None]
        self._walk.leave_out(self._index, self._part, leave_out.sum(dim=-1), self._share)
        return flat.masked_fill(leave_out, 0.0).view_as(x)


def thin(sites: list[tuple[int, FFNSite]], profile: Profile, walk: Walk) -> list[torch.utils.hooks.RemovableHandle]:
    """Let the layers of the skip region leave out parts as the profile's rule says.

    Args:
        sites: index and FFN of each, in order.
        profile: complete with its weights.
        walk: of the model.

    Raises:
        UnsupportedModelError: a layer is not made of plain matrices.
    """
    rule, weights = profile.skip.by, profile.weights
    assert isinstance(rule, Price), "the rule leaves no parts out"
    assert weights is not None, "the profile came without its weights"
    found = [(index, index - profile.skip.cold_s, parts_of(site.layer)) for index, site in sites]
    hooks = []
    for index, place, parts in found:
        for part in parts:
            limit = rule.limit(weights.tensors[tensor_name(part.role)][place], profile.skip.threshold)
            hook = ThinnedInput(part, ffn_share(parts, part.role), limit, index, walk)
            hooks += [matrix.register_forward_pre_hook(hook) for matrix in part.matrices]
    return hooks


def is_thinned(module: nn.Module) -> bool:
    """Whether a matrix has its input thinned."""
    return any(isinstance(hook, ThinnedInput) for hook in module._forward_pre_hooks.values())


def ffn_share(parts: list[Part], role: str) -> float:
    """What all inputs of a role are of the FFN's FLOPs; 0 for attention's."""
    flops = {part.role: part.width * part.flops for part in parts if part.role in FFN_ROLES}
    return flops.get(role, 0) / sum(flops.values())
