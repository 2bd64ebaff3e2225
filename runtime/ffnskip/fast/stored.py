"""A fused model on disk: its numbers, and of each matrix where it lies in the model's own files.

What is stored is small, as the weights stay where they are. It is read without transformers, whose import takes longer
than all else that a start needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ffnskip.errors import UnsupportedModelError
from ffnskip.fast.families import matrix_of
from ffnskip.fast.fused_model import FusedLayer, FusedModel, Rope
from ffnskip.fast.layout import lay_out
from ffnskip.model.matrix import Format, Matrix
from ffnskip.model.packed import PackedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUMBERS, _VECTORS = "model.json", "vectors.safetensors"
# The matrices of a layer as steps read them; those of a group lie next to each other.
_GROUPS = (("q", "k", "v"), ("out",), ("gate", "up"), ("down",))
_Look = Callable[[str], Tensor]


@dataclass(frozen=True)
class _Place:
    """Where a matrix lies: rows ``[begin, end)`` of the tensors of these names."""

    format: Format
    data: str
    scale: str | None
    begin: int
    end: int

    def matrix(self, look: _Look) -> Matrix:
        """The matrix in the files, row by row and without its bias."""
        scale = None if self.scale is None else look(self.scale)[self.begin : self.end]
        return Matrix(self.format, look(self.data)[self.begin : self.end], scale)


def store(fused: FusedModel, model: PreTrainedModel, files: Sequence[Path], folder: Path) -> None:
    """Write what `stored` reads.

    Args:
        fused: what was read of the model.
        model: the model, whose own tensors have the names that they have in the files.
        files: its safetensors files.
        folder: an empty one.

    Raises:
        UnsupportedModelError: a matrix is not in the files, or other numbers are.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    vectors = {f"ropes.{index}": rope.frequencies for index, rope in enumerate(fused.ropes)}

    def place(name: str, matrix: Matrix) -> dict[str, Any]:
        found = _place(matrix, named, look)
        if matrix.bias is not None:
            vectors[f"{name}.bias"] = matrix.bias
        return asdict(found)

    def parts(name: str, value: FusedLayer | FusedModel) -> dict[str, Any]:
        """The numbers and matrices of a layer or model; its vectors go into a file of their own."""
        found = {field.name: getattr(value, field.name) for field in fields(value)}
        vectors.update({f"{name}.{field}": part for field, part in found.items() if isinstance(part, Tensor)})
        return {
            field: place(f"{name}.{field}", part) if isinstance(part, Matrix) else part
            for field, part in found.items()
            if not isinstance(part, Tensor)
        }

    with _tensors(files) as look:
        layers = [parts(f"layers.{index}", layer) for index, layer in enumerate(fused.layers)]
        whole = parts("model", replace(fused, layers=[], ropes=()))
    dtype = str(fused.dtype).removeprefix("torch.")
    whole |= {"layers": layers, "ropes": [rope.scale for rope in fused.ropes], "dtype": dtype}
    (folder / _NUMBERS).write_text(json.dumps(whole))
    save_file({name: vector.clone() for name, vector in vectors.items()}, folder / _VECTORS)


def stored(folder: Path, files: Sequence[Path], *, by_input: bool) -> FusedModel:
    """The model that was stored, laid out for steps on the CPU.

    Args:
        folder: what `store` has written.
        files: the model's safetensors files, unchanged.
        by_input: as in `ffnskip.fast.families.fuse`.
    """
    whole, vectors = json.loads((folder / _NUMBERS).read_text()), load_file(folder / _VECTORS)
    layers, ropes = whole.pop("layers"), whole.pop("ropes")
    with _tensors(files) as look:
        linears = [
            [[_linear(_Place(**layer.pop(name)).matrix(look)) for name in group] for group in _GROUPS]
            for layer in layers
        ]
        head, embedding = _Place(**whole.pop("head")), _Place(**whole.pop("embedding"))
        output = _linear(head.matrix(look))
        own = None if embedding == head else embedding.matrix(look)
    lay_out([group for layer in linears for group in layer], by_input=by_input)
    lay_out([[output]])

    def read(name: str, linear: nn.Module) -> Matrix:
        return replace(matrix_of(linear), bias=vectors.get(f"{name}.bias"))

    def layer(index: int) -> FusedLayer:
        name = f"layers.{index}"
        matrices = {
            field: read(f"{name}.{field}", linear)
            for group, modules in zip(_GROUPS, linears[index], strict=True)
            for field, linear in zip(group, modules, strict=True)
        }
        of_layer = {field.name: vectors.get(f"{name}.{field.name}") for field in fields(FusedLayer)}
        return FusedLayer(**{**of_layer, **layers[index], **matrices})

    return FusedModel(
        **{**whole, "dtype": getattr(torch, whole["dtype"])},
        layers=[layer(index) for index in range(len(layers))],
        ropes=tuple(Rope(vectors[f"ropes.{index}"], scale) for index, scale in enumerate(ropes)),
        norm=vectors["model.norm"],
        head=read("model.head", output),
        embedding=matrix_of(output) if own is None else own,
    )


@contextmanager
def _tensors(files: Sequence[Path]) -> Iterator[_Look]:
    """Looks tensors up by their names in safetensors files, mapped into memory."""
    with ExitStack() as opened:
        found = {}
        for path in files:
            file = opened.enter_context(safe_open(path, "pt"))
            found.update(dict.fromkeys(file.keys(), file))

        def look(name: str) -> Tensor:
            if name not in found:
                raise UnsupportedModelError(f"The model's files have no tensor {name}.")
            tensor: Tensor = found[name].get_tensor(name)
            return tensor

        yield look


def _linear(matrix: Matrix) -> nn.Module:
    """A layer without a bias, for `lay_out`."""
    if matrix.scale is not None:
        return PackedLinear(matrix, torch.float32)
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = nn.Parameter(matrix.data, requires_grad=False)
    return linear


def _place(matrix: Matrix, named: Sequence[tuple[str, Tensor]], look: _Look) -> _Place:
    """Where the files have a matrix; raises UnsupportedModelError unless they have the very same numbers."""
    data, begin = _within(matrix.data, named)
    begin *= 2 if matrix.by_input else 1
    scale = None if matrix.scale is None else _within(matrix.scale, named)[0]
    place = _Place(matrix.format, data, scale, begin, begin + matrix.rows)
    ours, theirs = matrix.turned(by_input=False), place.matrix(look)
    if not (_same(ours.data, theirs.data) and _same(ours.scale, theirs.scale)):
        raise UnsupportedModelError(f"The model's files have other numbers in {data}.")
    return place


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    return x is y or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y))


def _within(part: Tensor, named: Sequence[tuple[str, Tensor]]) -> tuple[str, int]:
    """The name of the tensor whose rows these are, and the first of them."""
    for name, tensor in named:
        if tensor.dim() != part.dim() or tensor.dtype != part.dtype or tensor.stride() != part.stride():
            continue
        begin, rest = divmod(part.data_ptr() - tensor.data_ptr(), part.stride(0) * part.element_size())
        if rest == 0 and 0 <= begin <= len(tensor) - len(part) and tensor.shape[1:] == part.shape[1:]:
            return name, begin
    raise UnsupportedModelError("A matrix is none of the model's own.")
