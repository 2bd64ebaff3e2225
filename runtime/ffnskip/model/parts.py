"""The parts of a decoder layer that can be left out one by one: the inputs of its weight matrices.

Matrices that read the same input share its parts: the columns of query, key and value projection that multiply with one
input channel are left out together, and so are those of gate and up projection. An input of the down projection is one
neuron of the FFN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ffnskip.errors import UnsupportedModelError
from ffnskip.model.packed import PackedLinear
from ffnskip.model.sites import ffn_sites

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig

_FFN = ("mlp", "feed_forward", "shared_mlp")
# By role: the blocks of the layer, and the names that its matrices have in one family or another.
_ROLES = {
    "attention_input": (("self_attn",), (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))),
    "attention_output": (("self_attn",), (("o_proj",), ("out_proj",), ("dense",))),
    "ffn_input": (
        _FFN,
        (("gate_proj", "up_proj"), ("gate_up_proj",), ("w1", "w3"), ("fc1",), ("c_fc",), ("up_proj",)),
    ),
    "neurons": (_FFN, (("down_proj",), ("w2",), ("fc2",), ("c_proj",))),
}
ROLES = tuple(_ROLES)
FFN_ROLES = ("ffn_input", "neurons")


@dataclass(frozen=True)
class Part:
    """The inputs that some matrices of a layer share.

    Attributes:
        role: one of `ROLES`.
        matrices: the modules that read them.
        width: how many inputs there are.
        flops: of one input, for one token.
    """

    role: str
    matrices: tuple[nn.Module, ...]
    width: int
    flops: int


def parts_of(layer: nn.Module) -> list[Part]:
    """The parts of a decoder layer, in the order of `ROLES`.

    Raises:
        UnsupportedModelError: its attention or its FFN is not made of plain matrices of known names.
    """
    return [_part(layer, role) for role in ROLES]


def refuse_without_parts(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModelError for a configuration whose layers are not made of plain matrices, see `parts_of`.

    A model without weights is built from it; one whose code comes with its weights is not, and refused later.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    if getattr(config, "auto_map", None):
        return
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    for site in ffn_sites(model):
        parts_of(site.layer)


def _part(layer: nn.Module, role: str) -> Part:
    blocks, choices = _ROLES[role]
    block = next((block for name in blocks if (block := getattr(layer, name, None)) is not None), None)
    for matrices in _present(block, choices):
        width, outputs = int(matrices[0].in_features), sum(int(matrix.out_features) for matrix in matrices)
        return Part(role, tuple(matrices), width, 2 * outputs)
    raise UnsupportedModelError(
        f"Layers of type {type(layer).__name__} have no plain matrices for {role.replace('_', ' ')}: the rule price "
        "leaves out inputs of such matrices."
    )


def _present(block: nn.Module | None, choices: tuple[tuple[str, ...], ...]) -> Iterator[list[nn.Linear | PackedLinear]]:
    for names in choices:
        matrices = [getattr(block, name, None) for name in names]
        plain = [matrix for matrix in matrices if isinstance(matrix, nn.Linear | PackedLinear)]
        if len(plain) == len(names):
            yield plain
