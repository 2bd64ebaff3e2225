"""A model whose weight matrices are packed to int8 or int4, in place; everything else of it stays as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffnskip.errors import FfnskipError
from ffnskip.fast.matrix import Matrix, PackedFormat, pack
from ffnskip.layers import decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PackedLinear(nn.Module):
    """Stands where an `nn.Linear` stood. Each pass unpacks the weights, which is slow for few rows.

    The fast decode loop reads `matrix` itself.
    """

    def __init__(self, matrix: Matrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix = matrix
        self.dtype = dtype
        self.out_features, self.in_features = matrix.rows, matrix.columns

    @property
    def weight(self) -> Tensor:
        """Unpacked, ``[out_features, in_features]``."""
        return self.matrix.unpack(self.dtype)

    @property
    def bias(self) -> Tensor | None:
        """``[out_features]`` or None."""
        return None if self.matrix.bias is None else self.matrix.bias.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` to ``[..., out_features]``."""
        return F.linear(x, self.matrix.unpack(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class PackedEmbedding(nn.Module):
    """Stands where an embedding stood that shares its weights with a packed output head."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype, scale: float) -> None:
        super().__init__()
        self.matrix = matrix
        self.dtype = dtype
        self.scale = scale
        self.num_embeddings, self.embedding_dim = matrix.rows, matrix.columns

    @property
    def weight(self) -> Tensor:
        """Unpacked, ``[num_embeddings, embedding_dim]``."""
        return self.matrix.unpack(self.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids ``[...]`` to embeddings ``[..., embedding_dim]``."""
        chosen = tokens.flatten()
        scale = None if self.matrix.scale is None else self.matrix.scale[chosen]
        rows = Matrix(self.matrix.format, self.matrix.data[chosen], scale).unpack(self.dtype)
        return rows.view(*tokens.shape, -1) * self.scale


def pack_weights(model: PreTrainedModel, format: PackedFormat) -> None:
    """Pack every linear layer of the decoder, and the output head, freeing the matrices they had.

    Norms, biases and the routing of experts are left alone; an embedding is packed where it is the output head too.

    Args:
        model: a loaded model; it is changed for good.
        format: int8 or int4.

    Raises:
        FfnskipError: the format is unknown, or its matrices do not fit it.
    """
    body, head = decoder(model), model.get_output_embeddings()
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise FfnskipError("A model that is spread over devices cannot be packed: load it on one device.")
    places = [(parent, name) for parent in body.modules() for name, m in parent.named_children() if type(m) is nn.Linear]
    if not places:
        raise FfnskipError("The model has no plain linear layers that could be packed: load it unquantized.")
    for parent, name in places:
        linear = parent.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(parent, name, PackedLinear(pack(linear.weight, format, linear.bias), linear.weight.dtype))
    if type(head) is nn.Linear:
        packed = PackedLinear(pack(head.weight, format, head.bias), head.weight.dtype)
        embedding = model.get_input_embeddings()
        if embedding.weight is head.weight:
            scale = getattr(embedding, "embed_scale", 1.0)
            scale = float(scale.to(packed.dtype)) if isinstance(scale, Tensor) else float(scale)
            model.set_input_embeddings(PackedEmbedding(packed.matrix, packed.dtype, scale))
        model.set_output_embeddings(packed)
