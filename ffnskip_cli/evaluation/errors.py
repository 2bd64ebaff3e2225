"""Standard errors of figures and of differences between two models that answered the same questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_RESAMPLES = 300  # of a figure that is no mean; its standard error is then itself known to 4 %


@dataclass(frozen=True)
class Figure:
    """A figure with its standard error; None where that cannot be told."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Paired:
    """A figure of the dense model, of the one with the profile, and their difference, each with its error."""

    dense: Figure
    ffnskip: Figure
    difference: Figure

    def row(self, **names: object) -> dict[str, Any]:
        """The row of a table."""
        columns = {"dense": self.dense, "ffnskip": self.ffnskip, "difference": self.difference}
        cells = {name: figure.value for name, figure in columns.items()}
        errors = {f"{name}_stderr": figure.stderr for name, figure in columns.items()}
        return {**names, **cells, **errors}


def mean(values: Sequence[float]) -> Figure:
    """The mean; its error is the deviation over the root of the number."""
    n = len(values)
    middle = math.fsum(values) / n
    if n < 2:
        return Figure(middle, None)
    variance = math.fsum((value - middle) ** 2 for value in values) / (n - 1)
    return Figure(middle, math.sqrt(variance / n))


def paired(
    dense: Sequence[Any], skipping: Sequence[Any], figure: Callable[[Sequence[Any]], float] | None = None
) -> Paired:
    """Both models' figures over the same documents, in the same order.

    Args:
        dense, skipping: a value per document: numbers, or whatever `figure` takes.
        figure: makes the figure of the values; None is their mean. Its errors are those of a bootstrap over pairs.
    """
    if figure is None:
        differences = [b - a for a, b in zip(dense, skipping, strict=True)]
        return Paired(mean(dense), mean(skipping), mean(differences))
    a, b = figure(dense), figure(skipping)
    n, draw = len(dense), np.random.default_rng(0)
    resampled = []
    for _ in range(_RESAMPLES if n > 1 else 0):
        chosen = draw.integers(n, size=n).tolist()
        resampled.append((figure([dense[i] for i in chosen]), figure([skipping[i] for i in chosen])))
    errors: list[float | None] = [None, None, None]
    if resampled:
        drawn = np.array(resampled, dtype=float)
        columns = (drawn[:, 0], drawn[:, 1], drawn[:, 1] - drawn[:, 0])
        errors = [float(column.std(ddof=1)) for column in columns]
    values = (a, b, b - a)
    return Paired(*(Figure(value, error) for value, error in zip(values, errors, strict=True)))


def weighted(parts: Mapping[str, Paired], weights: Mapping[str, float]) -> Paired:
    """The weighted mean of independent figures by name, as that of a group of tasks."""

    def of(column: str) -> Figure:
        figures = [(weight, getattr(parts[name], column)) for name, weight in weights.items()]
        value = math.fsum(weight * figure.value for weight, figure in figures)
        errors = [None if figure.stderr is None else weight * figure.stderr for weight, figure in figures]
        known = [error for error in errors if error is not None]
        return Figure(value, math.hypot(*known) if len(known) == len(errors) else None)

    return Paired(of("dense"), of("ffnskip"), of("difference"))
