"""A model whose weight matrices are packed to int8 or int4, in place; everything else of it stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffnskip.errors import FfnskipError
from ffnskip.model.forward import product
from ffnskip.model.inputs import mean_squares
from ffnskip.model.int4 import GROUP, ROWS
from ffnskip.model.matrix import Matrix, PackedFormat, pack, pack_shape
from ffnskip.model.sites import decoder_body
from ffnskip.profiles.fingerprint import keep_fingerprint, weights_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_UNPACKED = 2**22  # numbers of a matrix that are unpacked at a time


class _Packed(nn.Module):
    """Holds a packed matrix as buffers, so that it moves with the model."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.format = matrix.format
        self.by_input = matrix.by_input
        self.register_buffer("data", matrix.data)
        self.register_buffer("scale", matrix.scale)
        self.register_buffer("wide_bias", matrix.bias)

    @property
    def matrix(self) -> Matrix:
        """What is held."""
        return Matrix(self.format, self.data, self.scale, self.wide_bias, self.by_input)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Packed:
        """Move to where the model moves; what the rest of it is cast to changes no packed number."""

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype:
                return moved
            moved = fn(tensor.view(torch.uint8)).view(tensor.dtype)
            return tensor if moved.data_ptr() == tensor.data_ptr() else moved

        super()._apply(kept, recurse)
        return self

    def _save_to_state_dict(self, *args: object, **kwargs: object) -> None:
        raise FfnskipError("Packed weights are saved by ffnskip.save_packed, not in the files of transformers.")

    def turn(self, by_input: bool) -> None:
        """Let rows or columns share bytes, see `Matrix.turned`."""
        turned = self.matrix.turned(by_input)
        self.data.data, self.by_input = turned.data, turned.by_input

    @property
    def weight(self) -> Tensor:
        """Unpacked, ``[rows, columns]``."""
        return self.matrix.unpack(self.dtype)


class PackedLinear(_Packed):
    """Stands where an `nn.Linear` stood. Each pass unpacks the weights, unless `multiplied_by` knows better.

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
        if (y := product(self.matrix, x)) is not None:
            return y
        parts = [_multiplied(x, rows) for rows in _in_parts(self.matrix)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _in_parts(matrix: Matrix) -> list[Matrix]:
    """Rows of a matrix that may be unpacked at the same time: an output head is large, and would be larger still."""
    n = max(1, _UNPACKED // matrix.columns // ROWS) * ROWS
    return [matrix[begin : min(begin + n, matrix.rows)] for begin in range(0, matrix.rows, n)]


def _multiplied(x: Tensor, matrix: Matrix) -> Tensor:
    bias = matrix.bias
    return F.linear(x, matrix.unpack(x.dtype), None if bias is None else bias.to(x.dtype))


class PackedEmbedding(_Packed):
    """Stands where an embedding stood, often one that shares its weights with the output head; times `factor`."""

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
    places = _places(model, format)
    keep_fingerprint(model, weights_sha256(model))  # profiles belong to what was loaded
    inputs = iter(_inputs(model, [_linear(*place) for place in places]) if format == "int4" else ())
    _replace(model, places, lambda linear: pack(linear.weight, format, linear.bias, next(inputs, None)))


def _inputs(model: PreTrainedModel, linears: list[nn.Linear]) -> list[Tensor]:
    """How much each layer's columns count; where one is the embedding too, all of them count as that as well."""
    embedding, inputs = model.get_input_embeddings(), mean_squares(model, linears)
    return [i + 1 if linear.weight is embedding.weight else i for linear, i in zip(linears, inputs, strict=True)]


def pack_shapes(model: PreTrainedModel, format: PackedFormat) -> None:
    """Do with a model without numbers, on the device ``meta``, what `pack_weights` does with one that has them.

    Raises:
        FfnskipError: as `pack_weights`.
    """
    _replace(model, _places(model, format), lambda linear: pack_shape(linear.weight, format, linear.bias))


def pack_from(model: PreTrainedModel, packed: Callable[[nn.Linear | nn.Embedding], Matrix]) -> None:
    """Put packed matrices in the places of the linear layers, the output head and the embedding.

    Args:
        model: a model whose own numbers do not matter.
        packed: gives the matrix for a module; of an embedding that is the output head too it is asked for the head's.

    Raises:
        FfnskipError: the model has no layers that can be packed.
    """
    embedding: Any = model.get_input_embeddings()
    _replace(model, _places(model, "int8"), packed)
    if model.get_input_embeddings() is embedding:
        _replace_embedding(model, packed(embedding), embedding.weight.dtype)


_Place = tuple[nn.Module, str]  # a layer's parent and its name there


def _places(model: PreTrainedModel, format: PackedFormat) -> list[_Place]:
    """Where the layers are that can be packed.

    Raises FfnskipError where there are none, or they do not fit the format.
    """
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise FfnskipError("A model that is spread over devices cannot be packed: load it on one device.")
    linears = {module for module in decoder_body(model).modules() if type(module) is nn.Linear}
    if not linears:
        raise FfnskipError(
            "The model has no plain linear layers that could be packed: it is packed or quantized already."
        )
    if type(head := model.get_output_embeddings()) is nn.Linear:
        linears.add(head)
    if format == "int4" and (wrong := [m.in_features for m in linears if m.in_features % GROUP]):
        raise FfnskipError(f"int4 needs rows of a multiple of {GROUP} numbers, not {wrong[0]}: choose int8.")
    return [(parent, name) for parent in model.modules() for name, m in parent.named_children() if m in linears]


def _linear(parent: nn.Module, name: str) -> nn.Linear:
    return cast(nn.Linear, parent.get_submodule(name))


def _replace(model: PreTrainedModel, places: list[_Place], packed: Callable[[nn.Linear], Matrix]) -> None:
    """Put packed layers in their places, and an embedding in that of one that shares the head's weights."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for place in places:
        linear = _linear(*place)
        layer = PackedLinear(packed(linear), linear.weight.dtype)
        if linear is head and embedding.weight is head.weight:
            _replace_embedding(model, layer.matrix, layer.dtype)
        setattr(*place, layer)


def _replace_embedding(model: PreTrainedModel, matrix: Matrix, dtype: torch.dtype) -> None:
    scale = getattr(model.get_input_embeddings(), "embed_scale", 1.0)
    scale = float(scale.to(dtype)) if isinstance(scale, Tensor) else float(scale)
    model.set_input_embeddings(PackedEmbedding(matrix, dtype, scale))
