"""The rule `price` in a fused step: where an input is left out, and what that adds up to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.errors import UnsupportedModelError
from ffnskip.fast.fused_model import FusedModel
from ffnskip.model.int4 import ROWS
from ffnskip.model.packed import PackedLinear
from ffnskip.model.parts import FFN_ROLES, ROLES
from ffnskip.model.sites import decoder_body
from ffnskip.rules.price import Price, tensor_name
from ffnskip.stats import SkipStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnskip.profiles.profile import Profile


def leaves_out_parts(profile: Profile | None) -> bool:
    """Whether a step for the profile reads matrices input by input."""
    return profile is not None and profile.skip.by.leaves_out_parts


def refuse_parts(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError where no step leaves out parts, before anything of the model is moved."""
    packed = [m for m in decoder_body(model).modules() if isinstance(m, PackedLinear) and m.format == "int4"]
    if packed and model.device.type != "cpu":
        raise UnsupportedModelError("The rule price has no fused decode step for int4 weights on a GPU.")
    if odd := [linear.out_features for linear in packed if linear.out_features % ROWS]:
        raise UnsupportedModelError(
            f"The rule price has a fused decode step for int4 matrices of a multiple of {ROWS} rows, not {odd[0]}."
        )


def limits(profile: Profile, device: torch.device) -> list[tuple[Tensor, ...]]:
    """For each layer of the skip region the magnitudes under which inputs are left out, in the order of `ROLES`."""
    rule, weights = profile.skip.by, profile.weights
    assert isinstance(rule, Price)
    assert weights is not None
    of_role = [
        rule.limit(weights.tensors[tensor_name(role)], profile.skip.threshold).to(device).contiguous() for role in ROLES
    ]
    return list(zip(*of_role, strict=True))


class PartCounts:
    """What a step counts of parts that are left out.

    Attributes:
        left_out: ``[layers, roles]`` int64, inputs that were left out; on the model's device, as is `least`.
        least: ``[1]`` float64, see `SkipStats`.
        shares: of an FFN's FLOPs, that one input is, in the order of `ROLES`; 0 for attention's.
    """

    def __init__(self, model: FusedModel) -> None:
        layer = model.layers[0]
        flops = (layer.q.rows + layer.k.rows + layer.v.rows, layer.out.rows, 2 * layer.gate.rows, layer.down.rows)
        widths = (layer.q.columns, layer.out.columns, layer.gate.columns, layer.down.columns)
        self._attention_flops = [
            0 if role in FFN_ROLES else 2 * of_input for role, of_input in zip(ROLES, flops, strict=True)
        ]
        of_ffn = [n * width if role in FFN_ROLES else 0 for role, n, width in zip(ROLES, flops, widths, strict=True)]
        self.shares = [whole / sum(of_ffn) / width for whole, width in zip(of_ffn, widths, strict=True)]
        self.left_out = torch.zeros(len(model.layers), len(ROLES), dtype=torch.int64, device=model.device)
        self.least = torch.ones(1, dtype=torch.float64, device=model.device)

    def drain(self, stats: SkipStats) -> None:
        """Move them to `stats`."""
        counted = self.left_out.cpu()
        ffns = (counted.double() @ torch.tensor(self.shares, dtype=torch.float64, device="cpu")).tolist()
        flops = int((counted * torch.tensor(self._attention_flops, device="cpu")).sum())
        stats.add(SkipStats(stats.n_layers, left_out=ffns, attention_flops=flops, least=float(self.least)))
        self.left_out.zero_()
        self.least.fill_(1.0)
