"""From least-squares fits to the weights of a compensation: whole, low-rank, or the mean alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.compensation.kinds import BIAS, DOWN, FIRST, KINDS, LINEAR, NEURONS, SECOND
from ffnskip.model.neurons import Neurons, activations, count_neurons, down_projection
from ffnskip_cli.calibration.fit.gradients import with_one
from ffnskip_cli.calibration.fit.normal import NormalEquations

if TYPE_CHECKING:
    from torch import nn

    from ffnskip.profiles.schema import Compensation


class Features:
    """What one layer's compensation is a linear function of: ``[x, a(x), 1]``, or ``[1]`` for the mean.

    Args:
        compensation: its kind.
        ffn: the layer's FFN module.
        index: which of its neurons ``a`` has; None for none.
    """

    def __init__(self, compensation: Compensation, ffn: nn.Module, index: Tensor | None) -> None:
        self._mean_only = not KINDS[compensation.kind].reads_input
        self._neurons = None if index is None else Neurons(ffn, index)

    def count(self, hidden: int) -> int:
        """How many features there are for FFNs of this width."""
        if self._mean_only:
            return 1
        return hidden + 1 + (0 if self._neurons is None else len(self._neurons))

    def __call__(self, x: Tensor) -> Tensor:
        """``[n, features]`` float32 of ``x [n, hidden]``."""
        if self._mean_only:
            return torch.ones(len(x), 1, device=x.device)
        if self._neurons is not None:
            self._neurons.to(x)
            return with_one(torch.cat([x, self._neurons(x)], dim=-1))
        return with_one(x)


def solve_map(
    fit: NormalEquations, ridge: float, compensation: Compensation, index: Tensor | None
) -> dict[str, Tensor]:
    """The tensors of `ffnskip.profiles.weights.Weights` but for the probe's, in float32.

    Args:
        fit: sums over the tokens to fit to, of `Features` and ``f``.
        ridge: the penalty.
        compensation: kind and rank.
        index: ``[layers, neurons]``; None without.
    """
    kind = KINDS[compensation.kind]
    if not kind.adds:
        return {}
    solution, hidden = fit.solve(ridge), fit.cross.shape[2]
    if not kind.reads_input:
        return {BIAS: solution[:, 0].float()}
    tensors: dict[str, Tensor] = {}
    if compensation.rank is None:
        tensors[LINEAR] = solution[:, :hidden].transpose(1, 2).float()
    else:
        thin = [_low_rank(fit, layer, solution[layer], compensation.rank, ridge) for layer in range(len(solution))]
        first, second, solutions = zip(*thin, strict=True)
        tensors |= {FIRST: torch.stack(first).float(), SECOND: torch.stack(second).float()}
        solution = torch.stack(solutions)
    tensors[BIAS] = solution[:, -1].float()
    if index is not None:
        tensors |= {NEURONS: index.to(torch.int32), DOWN: solution[:, hidden:-1].transpose(1, 2).float()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _low_rank(
    fit: NormalEquations, layer: int, solution: Tensor, rank: int, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced-rank regression (Izenman 1975), with the neurons and the intercept fitted anew to what is left.

    Of all maps ``x -> second first x`` of the given rank, the one whose outputs differ least from ``solution``'s after
    neurons and intercept have made up for what they can: ``min tr((W - W_r)ᵀ S (W - W_r))``, where ``S`` is the Gram
    matrix of what of ``x`` neurons and intercept do not explain.

    Returns:
        ``first [rank, hidden]``, ``second [hidden, rank]``, and the coefficients with those of ``x`` replaced.
    """
    hidden = fit.cross.shape[2]
    gram, cross = fit.gram[layer], fit.cross[layer]
    xx, xo, oo = gram[:hidden, :hidden], gram[:hidden, hidden:], gram[hidden:, hidden:].clone()
    oo.diagonal()[:-1] *= 1.0 + ridge  # as in `NormalEquations.solve`
    oo.diagonal()[:-1] += 1e-9 * oo.diagonal().mean()
    own = xx - xo @ torch.linalg.solve(oo, xo.T)
    weight = solution[:hidden]  # [inputs, outputs]
    _, vectors = torch.linalg.eigh(weight.T @ own @ weight)
    second = vectors[:, -rank:]
    first = (weight @ second).T
    thin = first.T @ second.T
    others = torch.linalg.solve(oo, cross[hidden:] - xo.T @ thin)
    return first, second, torch.cat([thin, others])


class NeuronChoice:
    """Finds the neurons of each FFN that a linear map of its input explains least, weighed by what they do.

    Neuron j adds ``a_j(x) d_j`` to the output. What of it is not a linear function of ``x`` has the damage
    ``Var(a_j | x) · d_jᵀ F d_j``, and the neurons with the largest are the ones worth running.

    Args:
        ffns: the FFN modules of the skip region.
        hidden: width of the stream.
    """

    def __init__(self, ffns: list[nn.Module], hidden: int) -> None:
        self._ffns = ffns
        self._fit = NormalEquations(len(ffns), hidden + 1, min(map(count_neurons, ffns)))

    def add(self, place: int, x: Tensor) -> None:
        """Take in the inputs ``x [n, hidden]`` of one layer's FFN."""
        self._fit.add(place, with_one(x), activations(self._ffns[place], x)[:, : self._fit.cross.shape[2]].float())

    def choose(self, count: int, fisher: Tensor) -> Tensor:
        """``[layers, count]`` integers, the most worthwhile first."""
        unexplained = self._fit.errors(self._fit.solve(ridge=1e-2)) / self._fit.count[:, None].clamp(min=1.0)
        chosen = []
        for place, ffn in enumerate(self._ffns):
            down = down_projection(ffn)[:, : self._fit.cross.shape[2]].double().cpu()
            harm = unexplained[place] * (down * (fisher[place].double() @ down)).sum(dim=0)
            chosen.append(harm.topk(count).indices)
        return torch.stack(chosen)
