"""What to add in place of a skipped FFN, and what predicts the damage of doing so.

A skipped FFN's output ``f`` is approximated from the FFN's own input ``x`` by

    g(x) = W x + D a(x) + b

where ``W`` is the zero matrix (`mean`), a whole one (`linear`), or the product of two thin ones (`low-rank`), and
``a(x)`` are the activations of a few of the FFN's own neurons, whose down projection ``D`` has been fitted anew to make
up for the others. The predicted damage of adding ``g`` is ``exp(p·x + c)`` nats, with one probe ``p`` per layer.

The weights of all layers of a profile lie in one safetensors file beside it, stacked over the layers of the skip
region. The rows of gate and up projection that ``a`` needs are those of the model and are not in the file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ffnskip.errors import ProfileError
from ffnskip.neurons import Neurons
from ffnskip.sections import Compensation, Skip
from ffnskip.strict_yaml import sentence

if TYPE_CHECKING:
    from torch import nn

MAX_BYTES = 8 * 2**30  # of a weights file

PROBE, PROBE_BIAS, BIAS = "probe.weight", "probe.bias", "bias"
LINEAR, FIRST, SECOND = "linear", "low_rank.first", "low_rank.second"
NEURONS, DOWN = "neurons.index", "neurons.down"

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16)


@dataclass(frozen=True, eq=False)
class Weights:
    """The numbers that go with a profile: tensors by name, stacked over the layers of the skip region.

    ``probe.weight [layers, hidden]`` and ``probe.bias [layers]``, ``bias [layers, hidden]``,
    ``linear [layers, hidden, hidden]`` or ``low_rank.first [layers, rank, hidden]`` and
    ``low_rank.second [layers, hidden, rank]``, ``neurons.index [layers, neurons]`` and
    ``neurons.down [layers, hidden, neurons]``, as far as rule and compensation need them (`expected_shapes`).
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


def expected_shapes(skip: Skip, compensation: Compensation, hidden: int) -> dict[str, tuple[int, ...]]:
    """The tensors that a profile's weights must have: exactly these."""
    layers, rank, neurons = skip.cold_e - skip.cold_s, compensation.rank, compensation.neurons
    shapes: dict[str, tuple[int, ...]] = {}
    if skip.rule == "predicted-damage":
        shapes |= {PROBE: (layers, hidden), PROBE_BIAS: (layers,)}
    if compensation.kind != "none":
        shapes[BIAS] = (layers, hidden)
    if compensation.kind == "linear":
        shapes[LINEAR] = (layers, hidden, hidden)
    if rank is not None:
        shapes |= {FIRST: (layers, rank, hidden), SECOND: (layers, hidden, rank)}
    if neurons:
        shapes |= {NEURONS: (layers, neurons), DOWN: (layers, hidden, neurons)}
    return shapes


def load_weights(path: Path, sha256: str, shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Read the weights of a profile.

    Args:
        path: the safetensors file.
        sha256: what the profile says that the file's hash is.
        shapes: what must be in it.

    Raises:
        ProfileError: the file is missing, is another one than the profile names, or holds something else.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _error(path, f"larger than {MAX_BYTES // 2**30} GiB")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a file name"
        raise _error(path, f"cannot be read ({reason}), and the profile needs it") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise _error(path, "not the file that the profile was made with, its sha256 is another one")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _error(path, f"not a safetensors file ({type(error).__name__})") from None
    weights = Weights(tensors)
    weights.__dict__["data"] = data
    check_weights(weights, shapes, str(path))
    return weights


def check_weights(weights: Weights, shapes: dict[str, tuple[int, ...]], source: str) -> None:
    """Raise ProfileError unless `weights` are exactly the tensors of these shapes, and finite numbers."""
    if (found := set(weights.tensors)) != set(shapes):
        wrong = sorted(found ^ set(shapes))[0]
        raise _error(source, "is missing" if wrong in shapes else "this rule with this kind has no such tensor", wrong)
    for name, tensor in weights.tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise _error(source, f"must have the shape {shapes[name]}, not {tuple(tensor.shape)}", name)
        if tensor.dtype not in (_INTEGERS if name == NEURONS else _FLOATS):
            kind = "whole" if name == NEURONS else "floating-point"
            raise _error(source, f"must hold {kind} numbers, not {str(tensor.dtype).removeprefix('torch.')}", name)
        if not bool(tensor.isfinite().all()):
            raise _error(source, "holds numbers that are not finite", name)


def _error(source: Path | str, what: str, tensor: str = "") -> ProfileError:
    return ProfileError(sentence(str(source), tensor, what))


class Compensator:
    """One layer's probe and ``g``, on the device and in the precision of what they are given.

    Args:
        weights: of the whole profile; None where rule and compensation need none.
        place: of the layer among those of the skip region.
        ffn: the layer's FFN module, whose neurons may be used.

    Raises:
        ProfileError: the FFN has no such neurons.
    """

    def __init__(self, weights: Weights | None, place: int, ffn: nn.Module) -> None:
        own = {} if weights is None else {name: tensor[place] for name, tensor in weights.tensors.items()}
        self._neurons = Neurons(ffn, own.pop(NEURONS)) if NEURONS in own else None
        self._original = self._own = own
        self._at: tuple[torch.device, torch.dtype] | None = None

    def score(self, x: Tensor) -> Tensor | None:
        """Logarithm of the damage in nats that is predicted for skipping, ``[n]`` float32; None without a probe.

        Args:
            x: what the FFN would read, ``[n, hidden]``.
        """
        if PROBE not in self._own:
            return None
        self._follow(x)
        # The bias goes on top in float32: the product alone is near 0, where bfloat16 is fine enough.
        return F.linear(x, self._own[PROBE][None])[:, 0].float() + self._own[PROBE_BIAS]

    def added(self, x: Tensor) -> Tensor:
        """``g(x)``, ``[n, hidden]``, or zeros where there is no compensation."""
        if BIAS not in self._own:
            return torch.zeros_like(x)
        self._follow(x)
        own = self._own
        if LINEAR in own:
            g = F.linear(x, own[LINEAR], own[BIAS])
        elif FIRST in own:
            g = F.linear(F.linear(x, own[FIRST]), own[SECOND], own[BIAS])
        else:
            g = own[BIAS].expand_as(x)
        return g if self._neurons is None else torch.addmm(g, self._neurons(x), own[DOWN].T)

    def _follow(self, x: Tensor) -> None:
        """Move to where the hidden states are, the first time and whenever that changes."""
        if self._at == (x.device, x.dtype):
            return
        self._at = (x.device, x.dtype)
        with torch.inference_mode(False):  # or a first pass in inference mode would forbid later ones with gradients
            self._own = {
                name: tensor.to(x.device, torch.float32 if name == PROBE_BIAS else x.dtype)
                for name, tensor in self._original.items()
            }
            if self._neurons is not None:
                self._neurons.to(x)
