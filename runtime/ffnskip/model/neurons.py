"""Single neurons of a gated FFN: ``a(x) = act(gate x) * (up x)``, as in Llama, Qwen, Gemma, Mistral, OLMo.

FFNs of another build have none that can be told apart here, and are compensated without.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ffnskip.errors import ProfileError
from ffnskip.model.packed import PackedLinear

_GATE, _UP, _DOWN = "gate_proj", "up_proj", "down_proj"
_REFUSAL = (
    "The profile's compensation uses neurons that the model's FFNs do not have as plain matrices: load the model "
    "unquantized and without adapters."
)


def count_neurons(ffn: nn.Module) -> int:
    """How many neurons an FFN has that can be run alone; 0 where they cannot be told apart."""
    projections = [getattr(ffn, name, None) for name in (_GATE, _UP, _DOWN)]
    if not all(_is_plain(projection) for projection in projections):
        return 0
    return _linear(ffn, _UP).out_features if callable(getattr(ffn, "act_fn", None)) else 0


def activations(ffn: nn.Module, x: Tensor) -> Tensor:
    """``a(x)`` of all neurons, ``[..., neurons]``, for ``x [..., hidden]``."""
    activated: Tensor = _act(ffn)(_linear(ffn, _GATE)(x))
    up: Tensor = _linear(ffn, _UP)(x)
    return activated * up


def down_projection(ffn: nn.Module) -> Tensor:
    """``[hidden, neurons]``: what each neuron adds to the FFN's output per unit of activation."""
    with align_module_device(projection := _linear(ffn, _DOWN)):
        return projection.weight.detach().clone()


class Neurons:
    """Some neurons of an FFN, with copies of their rows side by side in memory.

    Args:
        ffn: the module.
        index: which of them, ``[n]`` integers.

    Raises:
        ProfileError: the FFN has no such neurons.
    """

    def __init__(self, ffn: nn.Module, index: Tensor) -> None:
        if not 0 <= int(index.min()) <= int(index.max()) < count_neurons(ffn):
            raise ProfileError(_REFUSAL)
        self._act = _act(ffn)
        self._ffn = ffn
        self._projections = gate, up = tuple(_linear(ffn, name) for name in (_GATE, _UP))
        self._gate, self._gate_bias = _rows(gate, index)
        self._up, self._up_bias = _rows(up, index)

    def __call__(self, x: Tensor) -> Tensor:
        """Their activations, ``[..., n]``; raises ProfileError once an adapter has come between."""
        if self._projections != (self._ffn.gate_proj, self._ffn.up_proj):
            raise ProfileError(_REFUSAL)
        activated = self._act(F.linear(x, self._gate, self._gate_bias))
        return activated * F.linear(x, self._up, self._up_bias)

    def __len__(self) -> int:
        return len(self._up)

    def to(self, like: Tensor) -> None:
        """Move to another tensor's device and precision."""
        self._gate, self._up = self._gate.to(like), self._up.to(like)
        if self._gate_bias is not None and self._up_bias is not None:
            self._gate_bias, self._up_bias = self._gate_bias.to(like), self._up_bias.to(like)


def _is_plain(projection: nn.Module | None) -> bool:
    """Whether it multiplies with one matrix whose rows can be had."""
    return isinstance(projection, PackedLinear) or (
        type(projection) is nn.Linear and projection.weight.is_floating_point()
    )


def _linear(ffn: nn.Module, name: str) -> nn.Linear | PackedLinear:
    projection = ffn.get_submodule(name)
    assert isinstance(projection, nn.Linear | PackedLinear)
    return projection


def _act(ffn: nn.Module) -> Callable[[Tensor], Tensor]:
    act: Callable[[Tensor], Tensor] = ffn.act_fn  # type: ignore[assignment]
    return act


def _rows(projection: nn.Linear | PackedLinear, index: Tensor) -> tuple[Tensor, Tensor | None]:
    # The first brings in what accelerate keeps elsewhere; the second makes copies that gradients may flow past.
    with align_module_device(projection), torch.inference_mode(False):
        weight, bias = projection.weight, projection.bias
        index = index.long().to(weight.device)
        return weight.detach()[index], None if bias is None else bias.detach()[index]
