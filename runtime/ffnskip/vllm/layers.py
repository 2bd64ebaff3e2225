"""A profile on the decoder layers of a vLLM model.

Whole FFNs are skipped by what does it on every other model (`SkippableFFN`), parts are left out by what does it there
(`ThinnedInput`, which zeroes inputs and saves no time), and one `Walk` tells both which tokens may. vLLM's layers have
the names of the models that they run, but their matrices are fused, and shared out among the ranks of tensor parallel:

- Every rank sees whole hidden states, and they are equal to the bit, as they come out of an all-reduce. So all ranks
  decide alike, which they must: an FFN that runs waits for the others' share of it.
- The inputs of the output projection and of the down projection are shared out, and so are the limits of `price`. Each
  rank then counts what it leaves out of its own share; the mean over the ranks is what the model leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ffnskip.compensation.compensator import Compensator
from ffnskip.errors import UnsupportedModelError
from ffnskip.general.skippable import SkippableFFN
from ffnskip.general.thin import ThinnedInput, ffn_share
from ffnskip.general.walk import Walk
from ffnskip.model.parts import ROLES, Part
from ffnskip.model.sites import FFNSite
from ffnskip.rules.price import Price, tensor_name
from ffnskip.vllm.through import put, through

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ffnskip.profiles.profile import Profile

_MATRICES = {
    "attention_input": "self_attn.qkv_proj",
    "attention_output": "self_attn.o_proj",
    "ffn_input": "mlp.gate_up_proj",
    "neurons": "mlp.down_proj",
}


def refuse_rule(profile: Profile) -> None:
    """Raise UnsupportedModelError for a rule that cannot be had here."""
    if profile.skip.by.reads == "output":
        raise UnsupportedModelError(
            f"The rule {profile.skip.rule} compares an FFN's output with the stream, which vLLM adds up elsewhere: use "
            "a profile of the rule price or predicted-damage."
        )


def put_on(
    profile: Profile, layers: Sequence[nn.Module], plain: Sequence[nn.Module], walk: Walk, rank: int = 0, ranks: int = 1
) -> None:
    """Have vLLM's decoder layers skip as a profile says.

    Args:
        profile: complete with its weights.
        layers: vLLM's, all of them, in order.
        plain: the FFNs of the same model as Hugging Face has it, whose neurons a compensation may run; they may lie on
            disk.
        walk: tells which tokens may skip, and counts.
        rank, ranks: this process's share of the matrices.

    Raises:
        UnsupportedModelError: the rule, or a layer, is of another kind.
        ProfileError: the compensation uses neurons that the FFNs do not have as plain matrices.
    """
    refuse_rule(profile)
    region = range(profile.skip.cold_s, profile.skip.cold_e)
    if profile.skip.by.leaves_out_parts:
        for index in region:
            _thin(layers[index], index, profile, walk, rank, ranks)
        return
    compensators = [Compensator(profile, index - region.start, plain[index]) for index in region]
    for index, compensator in zip(region, compensators, strict=True):
        _skip(layers[index], index, walk, compensator)


def _skip(layer: nn.Module, index: int, walk: Walk, compensator: Compensator) -> None:
    mlp = layer.get_submodule("mlp")
    ffn = SkippableFFN(
        FFNSite(
            layer, (mlp,), "chain", norm_before=None, norm_after=getattr(layer, "post_feedforward_layernorm", None)
        ),
        index,
        walk,
        compensator,
    )
    ffn.install()
    put(place := f"layers.{index}.mlp", ffn.forward)
    mlp.forward = partial(through, place=place)


def _thin(layer: nn.Module, index: int, profile: Profile, walk: Walk, rank: int, ranks: int) -> None:
    rule, weights = profile.skip.by, profile.weights
    assert isinstance(rule, Price)
    assert weights is not None
    parts = [_part(layer, role) for role in ROLES]
    for part in parts:
        limit = rule.limit(weights.tensors[tensor_name(part.role)][index - profile.skip.cold_s], profile.skip.threshold)
        limit = _share(limit, part, rank, ranks)
        (matrix,) = part.matrices
        thinned = ThinnedInput(part, ffn_share(parts, part.role), limit, index, walk)
        put(place := f"layers.{index}.{_MATRICES[part.role]}", partial(_thinned, thinned, matrix))
        matrix.forward = partial(_behind, matrix.forward, place)


def _thinned(thinned: ThinnedInput, matrix: nn.Module, x: Tensor) -> Tensor:
    replaced = thinned(matrix, (x,))
    return x if replaced is None else replaced[0]


def _behind(forward: Callable[[Tensor], object], place: str, x: Tensor) -> object:
    return forward(through(x, place))


def _part(layer: nn.Module, role: str) -> Part:
    """This rank's share of the inputs of a role, whose matrices vLLM has fused into one."""
    matrix: Any = layer.get_submodule(_MATRICES[role])
    return Part(role, (matrix,), matrix.input_size_per_partition, 2 * matrix.output_size_per_partition)


def _share(limit: Tensor, part: Part, rank: int, ranks: int) -> Tensor:
    """The limits of this rank's inputs: all, or as many as it has from its place on."""
    if len(limit) == part.width:
        return limit
    if len(limit) != part.width * ranks:
        raise UnsupportedModelError(
            f"vLLM shares out the inputs of {part.role.replace('_', ' ')} as {part.width} a rank, which is no equal "
            f"share of the profile's {len(limit)}."
        )
    return limit[rank * part.width : (rank + 1) * part.width]
