"""A model whose weight matrices are packed to int8 or int4, in place; everything else of it stays as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffnskip.errors import FfnskipError
from ffnskip.model.inputs import mean_squares
from ffnskip.model.matrix import GROUP, Matrix, PackedFormat, pack
from ffnskip.model.sites import decoder_body
from ffnskip.profiles.fingerprint import keep_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Packed(nn.Module):
    """Holds a packed matrix as buffers, so that it moves with the model."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.format = matrix.format
        self.register_buffer("data", matrix.data)
        self.register_buffer("scale", matrix.scale)
        self.register_buffer("wide_bias", matrix.bias)

    @property
    def matrix(self) -> Matrix:
        """What is held."""
        return Matrix(self.format, self.data, self.scale, self.wide_bias)  # type: ignore[arg-type]

    def _save_to_state_dict(self, *args: object, **kwargs: object) -> None:
        raise FfnskipError("Packed weights cannot be saved: save the model before they are packed.")

    @property
    def weight(self) -> Tensor:
        """Unpacked, ``[rows, columns]``."""
        return self.matrix.unpack(self.dtype)


class PackedLinear(_Packed):
    """Stands where an `nn.Linear` stood. Each pass unpacks the weights, which is slow for few rows.

    The fused decode step reads `matrix` itself.
    """

    @property
    def bias(self) -> Tensor | None:
        """``[out_features]`` or None."""
        bias = self.matrix.bias
        return None if bias is None else bias.to(self.dtype)

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return self.matrix.columns

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.matrix.rows

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` to ``[..., out_features]``."""
        bias = self.matrix.bias
        return F.linear(x, self.matrix.unpack(x.dtype), None if bias is None else bias.to(x.dtype))


class PackedEmbedding(_Packed):
    """Stands where an embedding stood that shares its weights with a packed output head; multiplied by `factor`."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype, factor: float) -> None:
        super().__init__(matrix, dtype)
        self.factor = factor
        self.num_embeddings = matrix.rows

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids ``[...]`` to embeddings ``[..., embedding_dim]``."""
        matrix, chosen = self.matrix, tokens.flatten()
        scale = None if matrix.scale is None else matrix.scale[chosen]
        rows = Matrix(matrix.format, matrix.data[chosen], scale).unpack(self.dtype)
        return rows.view(*tokens.shape, -1) * self.factor


def pack_weights(model: PreTrainedModel, format: PackedFormat) -> None:
    """Pack every linear layer of the decoder, and the output head, freeing the matrices they had.

    Norms, biases and the routing of experts are left alone; an embedding is packed where it is the output head too. For
    int4 a few random tokens are passed through the model, to see which inputs are large.

    Args:
        model: a loaded model; it is changed for good.
        format: int8 or int4.

    Raises:
        FfnskipError: the format is unknown, or its matrices do not fit it.
    """
    body, head = decoder_body(model), model.get_output_embeddings()
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise FfnskipError("A model that is spread over devices cannot be packed: load it on one device.")
    linears = [
        (parent, name) for parent in body.modules() for name, m in parent.named_children() if type(m) is nn.Linear
    ]
    if not linears:
        raise FfnskipError(
            "The model has no plain linear layers that could be packed: it is packed or quantized already."
        )
    columns = [parent.get_submodule(name).in_features for parent, name in linears]
    if format == "int4" and (wrong := [n for n in columns if n % GROUP]):  # type: ignore[operator]
        raise FfnskipError(f"int4 needs rows of a multiple of {GROUP} numbers, not {wrong[0]}: choose int8.")
    keep_fingerprint(model)  # profiles belong to what was loaded
    inputs = iter(_inputs(model, linears) if format == "int4" else [])
    for parent, name in linears:
        setattr(parent, name, _packed(cast(nn.Linear, parent.get_submodule(name)), format, next(inputs, None)))
    if type(head) is nn.Linear:
        packed = _packed(head, format, next(inputs, None))
        embedding = model.get_input_embeddings()
        if embedding.weight is head.weight:
            scale = getattr(embedding, "embed_scale", 1.0)
            scale = float(scale.to(packed.dtype)) if isinstance(scale, Tensor) else float(scale)
            model.set_input_embeddings(PackedEmbedding(packed.matrix, packed.dtype, scale))
        model.set_output_embeddings(packed)


def _inputs(model: PreTrainedModel, linears: list[tuple[nn.Module, str]]) -> list[Tensor]:
    """`mean_squares` of the inputs of some layers of the body, and of the head."""
    head = model.get_output_embeddings()
    found = [cast(nn.Linear, parent.get_submodule(name)) for parent, name in linears]
    return mean_squares(model, [*found, *[head] * (type(head) is nn.Linear)])


def _packed(linear: nn.Linear, format: PackedFormat, inputs: Tensor | None) -> PackedLinear:
    return PackedLinear(pack(linear.weight, format, linear.bias, inputs), linear.weight.dtype)
