"""The numbers that go with a profile: one safetensors file beside it, stacked over the layers of the skip region."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ffnskip.compensation.kinds import NEURONS
from ffnskip.profiles.weights_file import error_in, read_weights_file

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16)


@dataclass(frozen=True, eq=False)
class Weights:
    """Tensors by name, each ``[layers, ...]``, as `Profile.weight_shapes` says: those of the rule
    (`ffnskip.rules.Rule.tensors`) and of the compensation (`ffnskip.compensation.kinds.tensor_shapes`).
    """

    tensors: dict[str, Tensor]

    @cached_property
    def data(self) -> bytes:
        """As a safetensors file: equal weights give the same bytes."""
        return save({name: self.tensors[name].contiguous() for name in sorted(self.tensors)})

    @cached_property
    def sha256(self) -> str:
        """Hash of that file, 64 hex digits."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def file_name(self) -> str:
        """By content, so that profiles that share their weights share the file, and no other one is written over."""
        return f"weights-{self.sha256[:12]}.safetensors"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Weights) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)


def load_weights(path: Path, sha256: str, shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Read the weights of a profile.

    Args:
        path: the safetensors file.
        sha256: what the profile says that the file's hash is.
        shapes: what must be in it.

    Raises:
        ProfileError: the file is missing, is another one than the profile names, or holds something else.
    """
    data = read_weights_file(path, sha256)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise error_in(path, f"not a safetensors file ({type(error).__name__})") from None
    weights = Weights(tensors)
    weights.__dict__["data"] = data
    check_weights(weights, shapes, str(path))
    return weights


def check_weights(weights: Weights, shapes: dict[str, tuple[int, ...]], source: str) -> None:
    """Raise ProfileError unless `weights` are exactly the tensors of these shapes, and finite numbers."""
    if (found := set(weights.tensors)) != set(shapes):
        wrong = sorted(found ^ set(shapes))[0]
        raise error_in(
            source, "is missing" if wrong in shapes else "this rule with this kind has no such tensor", wrong
        )
    for name, tensor in weights.tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise error_in(source, f"must have the shape {shapes[name]}, not {tuple(tensor.shape)}", name)
        if tensor.dtype not in (_INTEGERS if name == NEURONS else _FLOATS):
            kind = "whole" if name == NEURONS else "floating-point"
            raise error_in(source, f"must hold {kind} numbers, not {str(tensor.dtype).removeprefix('torch.')}", name)
        if not bool(tensor.isfinite().all()):
            raise error_in(source, "holds numbers that are not finite", name)
