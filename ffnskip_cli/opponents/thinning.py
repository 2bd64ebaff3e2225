"""Leave out channels whose score is under a limit, in one forward pass: what opponents of `parts` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ffnskip.model.parts import FFN_ROLES, parts_of
from ffnskip.model.sites import FFNSite, ffn_sites
from ffnskip.stats import SkipStats
from ffnskip_cli.measure.flops import model_cost

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnskip.profiles.profile import Profile

Score = Literal["magnitude", "with weights", "gate"]
_ACTIVATIONS = ("act_fn", "activation_fn")  # of gated FFNs, in all families


@dataclass(frozen=True)
class Place:
    """Channels that are left out together in all modules that read them.

    Attributes:
        modules: whose inputs they are, or whose outputs if `behind`.
        width: how many channels there are.
        flops: of one channel, for one token.
        in_ffn: whether these are FLOPs of the FFN.
        weight: ``[width]`` float32, what their magnitudes are multiplied with; None for nothing.
        behind: whether the channels are outputs.
    """

    modules: tuple[nn.Module, ...]
    width: int
    flops: int
    in_ffn: bool
    weight: Tensor | None = None
    behind: bool = False

    def score(self, x: Tensor) -> Tensor:
        """Of ``x [..., width]``, float32."""
        magnitude = x.abs().float()
        return magnitude if self.weight is None else magnitude * self.weight.to(x.device)


def places(site: FFNSite, score: Score) -> list[Place]:
    """Where a layer leaves channels out; nowhere for the score `gate` in an FFN without a gate."""
    parts = parts_of(site.layer)
    if score == "gate":
        inputs, neurons = (next(part for part in parts if part.role == role) for role in FFN_ROLES)
        named = {name.rpartition(".")[2]: module for name, module in site.ffn.named_modules()}
        activation = next((named[name] for name in _ACTIVATIONS if name in named), None)
        outputs = inputs.flops // 2
        if activation is None or outputs != 2 * neurons.width:
            return []
        return [Place((activation,), neurons.width, neurons.flops + 2 * inputs.width, True, behind=True)]
    norms = [_norms(part.matrices) if score == "with weights" else None for part in parts]
    return [
        Place(part.matrices, part.width, part.flops, part.role in FFN_ROLES, norm)
        for part, norm in zip(parts, norms, strict=True)
    ]


def _norms(matrices: Sequence[nn.Module]) -> Tensor:
    """Of the columns of matrices one below the other, ``[in_features]``."""
    squares = []
    for matrix in matrices:
        with align_module_device(matrix):
            squares.append(matrix.weight.detach().float().square().sum(dim=0))  # type: ignore[operator]
    return torch.stack(squares).sum(dim=0).sqrt()


@dataclass(frozen=True)
class Thinning:
    """Leaves out the channels with a score under a limit.

    Attributes:
        score: see the table.
        limits: by layer and place.
    """

    score: Score
    limits: tuple[tuple[float, ...], ...]

    def applied(self, model: PreTrainedModel, profile: Profile, sequence: Tensor) -> Thinned:
        """On the model, for passes over a ``sequence [length]``, past the warm-up of the profile."""
        return Thinned(model, self, profile.skip.warm_up)


class Thinned:
    """A thinning at work on a model inside a ``with``.

    Attributes:
        stats: what was left out.
    """

    def __init__(self, model: PreTrainedModel, thinning: Thinning, first: int) -> None:
        self._model, self._limits, self._first = model, thinning.limits, first
        self._layers = [places(site, thinning.score) for site in ffn_sites(model)]
        self._ffn_flops = model_cost(model).ffn_flops
        self.stats = SkipStats(len(self._layers))

    def __enter__(self) -> Thinned:
        self._left_out = torch.zeros(())
        self._context = at_places(self._layers, self._thin)
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        past = self._left_out.numel()
        self.stats.tokens, self.stats.warm_up_tokens = past, self._first
        self.stats.never_skipped = int((self._left_out == 0).sum())
        self.stats.least = float(self._left_out.min()) / len(self._layers)

    def _thin(self, layer: int, index: int, x: Tensor) -> Tensor:
        place = self._layers[layer][index]
        leave_out = place.score(x) < self._limits[layer][index]
        leave_out[:, : self._first] = False
        counts = leave_out[0, self._first :].sum(dim=-1).double().cpu()
        if place.in_ffn:
            left_out = counts * (place.flops / self._ffn_flops)
            self._left_out = self._left_out + left_out
            self.stats.left_out[layer] += float(left_out.sum())
        else:
            self.stats.attention_flops += int(counts.sum()) * place.flops
        return x.masked_fill(leave_out, 0.0)


@contextmanager
def at_places(layers: list[list[Place]], see: Callable[[int, int, Tensor], Tensor | None]) -> Iterator[None]:
    """While inside, ``see(layer, place, x)`` what passes each place, ``[1, length, width]``, and may replace it."""
    hooks = []
    for layer, index, place in ((i, j, place) for i, row in enumerate(layers) for j, place in enumerate(row)):
        once = _Once(partial(see, layer, index), len(place.modules))
        for module in place.modules:
            if place.behind:
                hooks.append(module.register_forward_hook(lambda module, args, output, once=once: once(output)))
            else:
                hooks.append(module.register_forward_pre_hook(lambda module, args, once=once: once(args[0])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Once:
    """Asks once for all modules that get the same input, in whatever order they run."""

    def __init__(self, see: Callable[[Tensor], Tensor | None], readers: int) -> None:
        self._see, self._readers = see, readers
        self._latest: tuple[Tensor, Tensor | None] | None = None
        self._read = 0

    def __call__(self, x: Tensor) -> Tensor | None:
        if self._latest is None or self._latest[0] is not x:
            self._latest, self._read = (x, self._see(x)), 0
        seen = self._latest[1]
        self._read += 1
        if self._read == self._readers:  # hold no activations longer than the layer does
            self._latest = None
        return seen
