"""The numbers that go with a profile: one safetensors file beside it, stacked over the layers of the skip region."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from ffnskip.compensation.kinds import NEURONS
from ffnskip.profiles.weights_file import check_facts, check_header, error_in, read_weights_file


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
    data = read_weights_file(path, sha256, shapes)
    check_header(data, shapes, str(path))
    weights = Weights(load(data))
    weights.__dict__["data"] = data
    check_weights(weights, shapes, str(path))
    return weights


def check_weights(weights: Weights, shapes: dict[str, tuple[int, ...]], source: str) -> None:
    """Raise ProfileError unless `weights` are exactly the tensors of these shapes, and numbers that can be used."""
    check_facts({name: (_kind(t), tuple(t.shape)) for name, t in weights.tensors.items()}, shapes, source)
    for name, tensor in weights.tensors.items():
        if name == NEURONS:
            _check_neurons(tensor, source)
        elif not bool(tensor.isfinite().all()):
            raise error_in(source, "holds numbers that are not finite", name)
        elif not bool(tensor.to(torch.bfloat16).isfinite().all()):  # whose largest number is less than float32's
            raise error_in(source, "holds numbers too large for bfloat16", name)


def _check_neurons(index: Tensor, source: str) -> None:
    """Raise ProfileError where a row of ``index [layers, n]`` names what cannot be a neuron, or one twice."""
    if bool((index < 0).any()):
        raise error_in(source, "holds negative numbers", NEURONS)
    ordered = index.sort(dim=-1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise error_in(source, "names a neuron twice", NEURONS)


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
