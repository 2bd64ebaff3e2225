"""Linear least squares in closed form, for all layers at once, from a stream of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


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


RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)


def best_ridge(fitted: NormalEquations, held_out: NormalEquations) -> float:
    """The ridge whose fit to some tokens has the least error on others, taken relative to each output's own size."""
    size = held_out.square.clamp(min=1e-30)
    return min(RIDGES, key=lambda ridge: float((held_out.errors(fitted.solve(ridge)) / size).mean()))
