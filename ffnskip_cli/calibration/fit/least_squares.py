"""Linear least squares in closed form, for all layers at once, and the maps of a compensation that come of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.compensation.kinds import BIAS, DOWN, FIRST, KINDS, LINEAR, NEURONS, SECOND
from ffnskip.model.neurons import Neurons, activations, count_neurons, down_projection

if TYPE_CHECKING:
    from torch import nn

    from ffnskip.profiles.schema import Compensation

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)


class NormalEquations:
    """Sums of products that a least-squares fit needs: memory grows with the layers and features, not with the tokens.

    The last feature is the constant 1, whose coefficient is the intercept. Products of a block of tokens are taken in
    float32 and summed up in float64.

    Args:
        layers: how many fits.
        features, outputs: columns of the regressors and of what they are to explain.

    Attributes:
        gram: ``[layers, features, features]``, sums of ``x xᵀ``.
        cross: ``[layers, features, outputs]``, sums of ``x yᵀ``.
        square: ``[layers, outputs]``, sums of ``y²``.
    """

    def __init__(self, layers: int, features: int, outputs: int) -> None:
        self.gram = torch.zeros(layers, features, features, dtype=torch.float64)
        self.cross = torch.zeros(layers, features, outputs, dtype=torch.float64)
        self.square = torch.zeros(layers, outputs, dtype=torch.float64)

    @property
    def count(self) -> Tensor:
        """Tokens per layer, ``[layers]``."""
        return self.gram[:, -1, -1]

    def add(self, layer: int, x: Tensor, y: Tensor) -> None:
        """Take in tokens: ``x [n, features]`` and ``y [n, outputs]``, both float32."""
        self.gram[layer] += (x.T @ x).double().cpu()
        self.cross[layer] += (x.T @ y).double().cpu()
        self.square[layer] += y.square().sum(dim=0).double().cpu()

    def blend(self, other: NormalEquations, weight: float) -> None:
        """Take in another fit's tokens, each counting as `weight` of one."""
        self.gram.add_(other.gram, alpha=weight)
        self.cross.add_(other.cross, alpha=weight)
        self.square.add_(other.square, alpha=weight)

    def scale(self, weight: float) -> None:
        """Let each token so far count as `weight` of one."""
        for sums in (self.gram, self.cross, self.square):
            sums.mul_(weight)

    def select(self, features: Tensor) -> NormalEquations:
        """The fit to some of the features alone: their indices, that of the constant 1 last."""
        chosen = NormalEquations(len(self.gram), len(features), self.cross.shape[2])
        chosen.gram = self.gram[:, features][:, :, features]
        chosen.cross, chosen.square = self.cross[:, features], self.square
        return chosen

    def solve(self, ridge: float) -> Tensor:
        """Coefficients ``[layers, features, outputs]`` of ridge regression; zeros for a layer without tokens.

        The penalty of a feature is `ridge` times its own sum of squares, as if all had been scaled to one size; the
        intercept has none.
        """
        return torch.stack([self._solve(layer, ridge) for layer in range(len(self.gram))])

    def _solve(self, layer: int, ridge: float) -> Tensor:
        gram, cross = self.gram[layer].clone(), self.cross[layer]
        if gram[-1, -1] == 0:
            return torch.zeros_like(cross)
        diagonal = gram.diagonal()
        diagonal[:-1] *= 1.0 + ridge
        diagonal[:-1] += 1e-9 * diagonal[:-1].mean()  # for a feature that was never anything but 0
        solution: Tensor = torch.linalg.solve(gram, cross)
        return solution

    def errors(self, coefficients: Tensor) -> Tensor:
        """Sums of squared errors on these tokens, ``[layers, outputs]``, of coefficients that `solve` gave."""
        fitted = torch.einsum("lfo,lfo->lo", coefficients, self.cross)
        within = torch.einsum("lfo,lfo->lo", coefficients, self.gram @ coefficients)
        return (self.square - 2 * fitted + within).clamp(min=0.0)


def best_ridge(fitted: NormalEquations, held_out: NormalEquations) -> float:
    """The ridge whose fit to some tokens has the least error on others, taken relative to each output's own size."""
    size = held_out.square.clamp(min=1e-30)
    return min(RIDGES, key=lambda ridge: float((held_out.errors(fitted.solve(ridge)) / size).mean()))


def with_one(x: Tensor) -> Tensor:
    """``[x, 1]``, float32."""
    return torch.cat([x.float(), torch.ones(*x.shape[:-1], 1, device=x.device)], dim=-1)


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
