"""A profile as plain numbers: what a fused step needs to know of it, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnskip.compensation.kinds import BIAS, DOWN, FIRST, LINEAR, NEURONS, SECOND
from ffnskip.errors import ProfileError, UnsupportedModelError
from ffnskip.fast.codes import RULES
from ffnskip.fast.parts import limits
from ffnskip.model.matrix import Matrix, plain
from ffnskip.profiles.profile import Profile
from ffnskip.rules.base import Reads
from ffnskip.rules.cosine import reach
from ffnskip.rules.predicted_damage import PROBE, PROBE_BIAS


@dataclass(frozen=True, eq=False)
class FusedCompensation:
    """One layer's probe and ``g(x) = second (first x) + down a(x) + bias`` (docs/predicted-damage.md).

    Attributes:
        probe: ``[hidden]`` float32, or None for the rule `cosine`.
        probe_bias: its intercept, in log nats.
        first: ``[rank, hidden]``, or None: then `second`, if there is one, takes ``x`` itself.
        second: ``[hidden, rank]`` or ``[hidden, hidden]``, or None.
        neurons: ``[n]`` int32, which of the FFN's own neurons run, or None.
        down: ``[hidden, n]``, their down projection, or None.
        bias: ``[hidden]`` float32; zeros where there is no compensation.
    """

    probe: Tensor | None
    probe_bias: float
    first: Matrix | None
    second: Matrix | None
    neurons: Tensor | None
    down: Matrix | None
    bias: Tensor


@dataclass(frozen=True, eq=False)
class FusedSkip:
    """When a fused step skips, and what it adds for a skipped FFN.

    Attributes:
        rule: its name; one of `RULES`.
        reads: what the rule's value is read from.
        threshold: what a value is compared with: of the similarity; or of the damage, in log nats.
        reach: how many FFNs one trigger of `cosine` skips at most.
        cold_s, cold_e: the skip region, layers ``[cold_s, cold_e)``.
        looked_at: the layers in which a value is read.
        layers: of the skip region, in order; none for a rule that skips no FFN as a whole.
        limits: per layer of the skip region, for a rule that leaves out parts (`ffnskip.fast.parts.limits`).
    """

    rule: str
    reads: Reads
    threshold: float
    reach: int
    cold_s: int
    cold_e: int
    looked_at: range
    layers: Sequence[FusedCompensation]
    limits: Sequence[tuple[Tensor, ...]] = ()


def fuse_profile(profile: Profile, intermediate: int, device: torch.device) -> FusedSkip:
    """Lay a profile's settings and weights out as a decode step reads them.

    Args:
        profile: complete with its weights.
        intermediate: neurons of an FFN of the model.
        device: where the model is.

    Raises:
        ProfileError: it needs weights that are missing, or neurons that the model does not have.
        UnsupportedModelError: there is no fused step for its rule.
    """
    profile.refuse_missing_weights()
    skip, rule = profile.skip, profile.skip.by
    if skip.rule not in RULES:
        raise UnsupportedModelError(f"The rule {skip.rule} has no fused decode step.")
    tensors = {} if profile.weights is None else profile.weights.tensors
    layers = (
        []
        if rule.leaves_out_parts
        else [
            _compensation({name: t[index].to(device) for name, t in tensors.items()}, profile, intermediate, device)
            for index in range(skip.cold_e - skip.cold_s)
        ]
    )
    return FusedSkip(
        rule=skip.rule,
        reads=rule.reads,
        threshold=rule.bound(skip.threshold),
        reach=reach(skip),
        cold_s=skip.cold_s,
        cold_e=skip.cold_e,
        looked_at=rule.looks_at(skip.cold_s, skip.cold_e),
        layers=layers,
        limits=limits(profile, device) if rule.leaves_out_parts else (),
    )


def _compensation(
    tensors: dict[str, Tensor], profile: Profile, intermediate: int, device: torch.device
) -> FusedCompensation:
    neurons = tensors[NEURONS].to(torch.int32) if NEURONS in tensors else None
    if neurons is not None and not 0 <= int(neurons.min()) <= int(neurons.max()) < intermediate:
        raise ProfileError("The profile's compensation uses neurons that the model's FFNs do not have.")
    none = torch.zeros(profile.model.hidden_size, dtype=torch.float32, device=device)
    return FusedCompensation(
        probe=tensors[PROBE].float() if PROBE in tensors else None,
        probe_bias=float(tensors[PROBE_BIAS]) if PROBE in tensors else 0.0,
        first=_matrix(tensors.get(FIRST)),
        second=_matrix(tensors.get(SECOND, tensors.get(LINEAR))),
        neurons=neurons,
        down=_matrix(tensors.get(DOWN)),
        bias=tensors[BIAS].float() if BIAS in tensors else none,
    )


def _matrix(tensor: Tensor | None) -> Matrix | None:
    if tensor is None:
        return None
    return plain(tensor if tensor.dtype == torch.bfloat16 else tensor.float())
