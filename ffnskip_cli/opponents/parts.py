"""Parts of every layer, as the rule `price` leaves them out, by other scores.

All set channels to zero whose score is under a limit. A limit is the quantile of the scores on a sample of text that
gives the wanted sparsity, the share of channels that is left out. All layers take part, and the warm-up of the profile
that they are compared with stays dense.

===============  ======================================  ===============================================================
row              score of channel i                      sparsities
===============  ======================================  ===============================================================
`teal`           |x_i|, x the input of any matrix        the same everywhere (TEAL, Liu et al. 2024, section 4.1)
`teal-greedy`    the same                                of the parts of each block, by a greedy search for the least
                                                         error of the block's output (its algorithm 1)
`wina`           |x_i| ‖W_i‖, W_i the weights of x_i     the same everywhere (WINA, Chen et al. 2025, section 3)
`cats`           |act(gate x)_i|, neuron i of the FFN    the same everywhere; up and down projection leave the neuron
                                                         out, the gate stays whole (CATS, Lee et al. 2024, section 4)
===============  ======================================  ===============================================================

Matrices that read the same input share its channels, as fused matrices do. WINA's paper keeps a number of channels for
each token; here a limit decides, as in the others, and the orthogonal transformation of its theory is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ffnskip.errors import FfnskipError
from ffnskip.model.forward import forward
from ffnskip.model.sites import ffn_sites, input_device
from ffnskip_cli.opponents.field import Field, Opponent
from ffnskip_cli.opponents.thinning import Place, Score, Thinning, at_places, places
from ffnskip_cli.progress import Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BINS, _SHIFT = 1 << 15, 16  # of magnitudes: bfloat16 numbers that are not negative
_STEP = 0.02  # of a block's FLOPs that the greedy search leaves out at a time
_BISECTIONS = 40
_SEARCHED = 2  # sequences on which it measures errors


class Quantiles:
    """The distribution of the scores at every place of a model, on a sample of text.

    Args:
        model: the untouched model.
        score: of the channels.
        sample: ``[sequences, length]``.
        first: the first position that counts.
        track: shows progress.
    """

    def __init__(self, model: PreTrainedModel, score: Score, sample: Tensor, first: int, track: Track) -> None:
        self.layers = [places(site, score) for site in ffn_sites(model)]
        counts = [torch.zeros(len(row), _BINS, dtype=torch.int64) for row in self.layers]

        def see(layer: int, index: int, x: Tensor) -> None:
            bins = self.layers[layer][index].score(x[0, first:]).flatten().view(torch.int32) >> _SHIFT
            counts[layer][index] += bins.bincount(minlength=_BINS).cpu()

        with torch.inference_mode(), at_places(self.layers, see):
            for sequence in track(sample, "taking quantiles", len(sample)):
                forward(model, sequence[None].long().to(input_device(model)), use_cache=False)
        self._below = [(row.cumsum(dim=1) / row.sum(dim=1, keepdim=True)).double() for row in counts]

    def limit(self, layer: int, index: int, sparsity: float) -> float:
        """The score under which that share of the channels is, linear within a bin."""
        below = self._below[layer][index]
        upper = int(torch.searchsorted(below, min(sparsity, 1.0)))
        low, high = (torch.tensor([upper, upper + 1], dtype=torch.int32) << _SHIFT).view(torch.float32).tolist()
        before = float(below[upper - 1]) if upper else 0.0
        inside = (min(sparsity, 1.0) - before) / max(float(below[upper]) - before, 1e-12)
        return float(low + inside * (high - low))

    def saved(self, sparsity: float) -> float:
        """FLOPs for one token of what lies under the limits of one sparsity, among it all channels that are zero."""
        return sum(
            place.width * place.flops * max(sparsity, float(self._below[layer][index][0]))
            for layer, row in enumerate(self.layers)
            for index, place in enumerate(row)
        )

    def uniform(self, sparsity: float) -> tuple[tuple[float, ...], ...]:
        """Limits for one sparsity everywhere."""
        return self.at([[sparsity] * len(row) for row in self.layers])

    def at(self, sparsities: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
        """Limits for sparsities by layer and place."""
        return tuple(
            tuple(self.limit(layer, index, sparsity) for index, sparsity in enumerate(row))
            for layer, row in enumerate(sparsities)
        )


def uniform(score: Score, field: Field) -> Opponent:
    """Leaves out the same share of channels everywhere: TEAL (uniform), WINA or CATS, by the score."""
    quantiles = Quantiles(field.model, score, field.sample, field.first, field.lab.track)
    return Opponent(field.bare(), Thinning(score, quantiles.uniform(_sparsity(field, quantiles))))


def teal_greedy(field: Field) -> Opponent:
    """TEAL with the sparsities that its greedy search finds for each block."""
    quantiles = Quantiles(field.model, "magnitude", field.sample, field.first, field.lab.track)
    sparsity = _sparsity(field, quantiles)
    paths = greedy_paths(field.model, quantiles, sparsity, field.sample[:_SEARCHED], field.first, field.lab.track)
    limits = quantiles.at([between(path, sparsity) for path in paths])
    return Opponent(field.bare(), Thinning("magnitude", limits))


def _sparsity(field: Field, quantiles: Quantiles) -> float:
    """The share of the channels, at every place, that saves as much as is wanted; by bisection.

    Channels that are zero go first, all at once. Behind ReLU they are more than some savings take.
    """
    field.refuse_beyond(quantiles.saved(1.0) / field.flops_per_token)
    if (zeros := quantiles.saved(0.0) / field.flops_per_token) > field.saved:
        raise FfnskipError(f"leaving out nothing but zeros saves {zeros:.3f} of the FLOPs already")
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if quantiles.saved(middle) < field.saved * field.flops_per_token else (low, middle)
    return high


Path = list[tuple[float, tuple[float, ...]]]
"""Of a greedy search: after each step the sparsity of the whole block, and of each of its places."""


def between(path: Path, sparsity: float) -> tuple[float, ...]:
    """The sparsities of the places where the block has that one, linear between two steps."""
    for (low, before), (high, after) in pairwise(path):
        if sparsity <= high:
            share = (sparsity - low) / (high - low)
            return tuple(a + share * (b - a) for a, b in zip(before, after, strict=True))
    return path[-1][1]


@torch.inference_mode()
def greedy_paths(
    model: PreTrainedModel, quantiles: Quantiles, target: float, sample: Tensor, first: int, track: Track
) -> list[Path]:
    """For each layer, the steps of TEAL's algorithm 1 up to a sparsity of `target`.

    Each step tries every place of the block with `_STEP` of the block's FLOPs more left out, and keeps the one after
    which the block's output is closest to the dense block's, by the norm of the difference on the dense inputs.
    """
    layers = [site.layer for site in ffn_sites(model)]
    calls = _block_inputs(model, layers, sample)
    paths = []
    for index, layer in track(enumerate(layers), "searching sparsities", len(layers)):
        examples = [(args, kwargs, _output(layer, args, kwargs)) for args, kwargs in calls[index]]
        error = partial(_block_error, layer, quantiles, index, examples, first)
        paths.append(_greedy_path(quantiles.layers[index], error, target))
    return paths


def _greedy_path(of_block: list[Place], error: Callable[[Sequence[float]], float], target: float) -> Path:
    flops = [place.width * place.flops for place in of_block]
    shares = [value / sum(flops) for value in flops]
    path: Path = [(0.0, (0.0,) * len(of_block))]
    while path[-1][0] < target:
        now = path[-1][1]
        trials = [
            (*now[:i], min(now[i] + _STEP / share, 1.0), *now[i + 1 :]) for i, share in enumerate(shares) if now[i] < 1
        ]
        best = min(trials, key=error)
        path.append((sum(share * value for share, value in zip(shares, best, strict=True)), best))
    return path


def _block_inputs(model: PreTrainedModel, layers: list[nn.Module], sample: Tensor) -> list[list[tuple[Any, Any]]]:
    """By layer and sequence, the arguments with which the dense model calls the layer."""
    calls: list[list[tuple[Any, Any]]] = [[] for _ in layers]
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: calls[index].append((args, kwargs)), with_kwargs=True
        )
        for index, layer in enumerate(layers)
    ]
    try:
        for sequence in sample:
            forward(model, sequence[None].long().to(input_device(model)), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _block_error(
    layer: nn.Module,
    quantiles: Quantiles,
    index: int,
    examples: list[tuple[Any, Any, Tensor]],
    first: int,
    sparsities: Sequence[float],
) -> float:
    """How far the block's output is from the dense block's, over examples of its arguments and its dense output."""
    limits = [quantiles.limit(index, place, sparsity) for place, sparsity in enumerate(sparsities)]

    def thin(_: int, place: int, x: Tensor) -> Tensor | None:
        leave_out = quantiles.layers[index][place].score(x) < limits[place]
        leave_out[:, :first] = False
        return x.masked_fill(leave_out, 0.0)

    with at_places([quantiles.layers[index]], thin):
        return sum(
            float((_output(layer, args, kwargs) - dense).float().square().sum()) for args, kwargs, dense in examples
        )


def _output(layer: nn.Module, args: Any, kwargs: Any) -> Tensor:
    output = layer(*args, **kwargs)
    return output if isinstance(output, Tensor) else output[0]
