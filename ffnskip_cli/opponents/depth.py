"""Whole layers, attention and all: ShortGPT, which removes layers, and SkipDecode, whose later tokens take fewer.

A token that leaves a layer out passes it unchanged and leaves nothing in that layer's key-value cache. Nobody misses
it: whatever one token leaves out, all later ones of the sequence leave out as well. FLOPs are those of the layer's
matrices and of its attention over the keys at hand.

Where a saving asks for a fraction of a layer, ShortGPT's last layer is removed from some position on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.model.forward import forward
from ffnskip.model.sites import ffn_sites, input_device
from ffnskip.profiles.profile import Profile
from ffnskip.stats import SkipStats
from ffnskip_cli.measure.flops import LayerCost, layer_costs, model_cost
from ffnskip_cli.opponents.field import Field, Opponent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BISECTIONS = 40


@dataclass(frozen=True)
class Depth:
    """Which layers to leave out, by position.

    Attributes:
        order: layers, the first to be left out in front.
        mean: how many of them a token past the warm-up leaves out, on average.
        grows: whether that grows linearly with the position, from none in the prompt and the warm-up; else the layers
            are gone for all tokens.
    """

    order: tuple[int, ...]
    mean: float
    grows: bool

    def counts(self, first: int, length: int) -> Tensor:
        """How many layers each position leaves out, ``[length]`` int64, never fewer than the one before."""
        past = length - first
        if self.grows:
            last = min(2 * self.mean, float(len(self.order)))
            ramp = torch.linspace(2 * self.mean - last, last, past, dtype=torch.float64)
            return torch.cat([torch.zeros(first, dtype=torch.int64), (ramp + 0.5).floor().long()])
        whole = int(self.mean)
        late = torch.arange(length) >= length - round((self.mean - whole) * past)
        return whole + late.long()

    def left_out(self, first: int, length: int, n_layers: int) -> Tensor:
        """``[length, n_layers]`` bool."""
        left_out = torch.zeros(length, n_layers, dtype=torch.bool)
        left_out[:, list(self.order)] = torch.arange(len(self.order)) < self.counts(first, length)[:, None]
        return left_out

    def applied(self, model: PreTrainedModel, profile: Profile, sequence: Tensor) -> Shortened:
        """See `ffnskip_cli.measure.quality.Way`."""
        first, n_layers = profile.skip.warm_up, profile.model.n_layers
        return Shortened(model, self.left_out(first, len(sequence), n_layers), first)


class Shortened:
    """The model without some layers at some positions, inside a ``with`` and for passes over one whole sequence.

    Args:
        model: the dense model.
        left_out: ``[length, n_layers]`` bool.
        first: the first position that counts.

    Attributes:
        stats: what is left out, of the FFNs and of attention.
    """

    def __init__(self, model: PreTrainedModel, left_out: Tensor, first: int) -> None:
        self._layers = [site.layer for site in ffn_sites(model)]
        self._left_out = left_out
        past = left_out[first:]
        self.stats = SkipStats(
            len(self._layers),
            tokens=len(past),
            warm_up_tokens=first,
            never_skipped=int((~past.any(dim=1)).sum()),
            skipped=past.sum(dim=0).tolist(),
        )
        ffn = model_cost(model).ffn_flops
        flops = _flops(layer_costs(model), left_out, first)
        self.stats.attention_flops = round(flops - sum(self.stats.skipped) * ffn)

    def __enter__(self) -> Shortened:
        chosen = [layer for layer in range(len(self._layers)) if self._left_out[:, layer].any()]
        self._hooks = [
            self._layers[layer].register_forward_hook(partial(_pass_by, self._left_out[:, layer]), with_kwargs=True)
            for layer in chosen
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()


def shortgpt(field: Field) -> Opponent:
    """Removes the layers with the lowest Block Influence, 1 - the mean cosine of a layer's input and output.

    ShortGPT (Men et al. 2024), section 3; measured on the sample.
    """
    blocks = block_similarities(field)
    order = sorted(range(len(blocks)), key=lambda layer: blocks[layer], reverse=True)
    return _solved(field, Depth(tuple(order), 0.0, grows=False))


def skipdecode(field: Field) -> Opponent:
    """Leaves out more layers the later the token, from the second one upwards.

    SkipDecode (Del Corro et al. 2023), section 3: the number falls linearly with the position; the prompt, here with
    the warm-up, and the first layer run in full.
    """
    return _solved(field, Depth(tuple(range(1, field.cost.n_layers)), 0.0, grows=True))


@torch.inference_mode()
def block_similarities(field: Field) -> list[float]:
    """How little each layer turns what passes through it: the mean cosine of input and output on the sample.

    Raises:
        UnsupportedModelError: layers hand on something else than one stream.
    """
    layers = [site.layer for site in ffn_sites(field.model)]
    sums = [0.0] * len(layers)

    def see(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        entered, left = _stream(module, args, kwargs, output)
        cosine = F.cosine_similarity(entered.float(), left.float(), dim=-1)
        sums[layer] += float(cosine[:, field.first :].mean())

    hooks = [layer.register_forward_hook(partial(see, i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        for sequence in field.lab.track(field.sample, "ranking layers", len(field.sample)):
            forward(field.model, sequence[None].long().to(input_device(field.model)), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [total / len(field.sample) for total in sums]


def _solved(field: Field, depth: Depth) -> Opponent:
    """With as many layers left out as the saving takes, by bisection."""
    if getattr(field.model.config.get_text_config(), "num_kv_shared_layers", None):
        raise FfnskipError("some layers read keys and values of others, which then cannot be left out")
    costs, first, length = layer_costs(field.model), field.first, field.length
    dense = field.cost.dense_flops(first, length)

    def saved(mean: float) -> float:
        left_out = replace(depth, mean=mean).left_out(first, length, len(costs))
        return _flops(costs, left_out, first) / dense

    low, high = 0.0, float(len(depth.order))
    field.refuse_beyond(saved(high))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if saved(middle) < field.saved else (low, middle)
    return Opponent(field.bare(), replace(depth, mean=high))


def _flops(costs: Sequence[LayerCost], left_out: Tensor, first: int) -> float:
    """Of the layers that are left out from position `first` on; a token at position p would attend to p + 1 keys."""
    keys = torch.arange(1, len(left_out) + 1, dtype=torch.float64)[:, None]
    matrices = torch.tensor([cost.flops for cost in costs], dtype=torch.float64)
    per_key = torch.tensor([cost.flops_per_key for cost in costs], dtype=torch.float64)
    return float(((matrices + keys * per_key) * left_out)[first:].sum())


def _pass_by(left_out: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook of a layer: what entered, ``[1, length, hidden]``, leaves unchanged where it is left out."""
    entered, left = _stream(module, args, kwargs, output)
    kept = torch.where(left_out.to(left.device)[:, None], entered, left)
    return kept if isinstance(output, Tensor) else (kept, *output[1:])


def _stream(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    """What entered a layer and what left it, ``[1, length, hidden]`` on the device of the latter."""
    entered = args[0] if args else kwargs["hidden_states"]
    left = output if isinstance(output, Tensor) else output[0]
    if left.shape != entered.shape or left.dim() != 3:
        raise UnsupportedModelError(f"layers of type {type(module).__name__} hand on more than one stream")
    return entered.to(left.device), left
