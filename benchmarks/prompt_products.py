"""Products with many vectors, which reading a prompt is made of: the runtime's beside PyTorch's in float32.

    python benchmarks/prompt_products.py --threads 2

prints a table as Markdown: billions of multiply-adds per second by the format of the weights. Ways take turns, and the
fastest of the rounds counts: on a machine that others use as well, it is the one that nobody interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor

from ffnskip.fast.build import step_library
from ffnskip.fast.products import multiply_by
from ffnskip.model.matrix import Matrix, pack, plain

SHAPES = [(576, 1536), (1536, 576), (1536, 8960), (8960, 1536), (4096, 14336)]  # inputs, outputs


def main(
    vectors: Annotated[int, typer.Option(help="Vectors, which are tokens of the prompt.")] = 256,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    rounds: Annotated[int, typer.Option(help="Times that each is measured.")] = 15,
) -> None:
    """Measure and print."""
    torch.set_num_threads(threads)
    names = ["PyTorch float32", "float32", "bfloat16", "int8", "int4"]
    print("| inputs -> outputs | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for columns, rows in SHAPES:
        weight, x = torch.randn(rows, columns), torch.randn(vectors, columns)
        ways = [_torch(weight, x)] + [_ours(matrix, x) for matrix in _formats(weight)]
        best = [float("inf")] * len(ways)
        for _ in range(rounds):
            best = [min(before, _seconds(way)) for before, way in zip(best, ways, strict=True)]
        speeds = [f"{vectors * rows * columns / seconds / 1e9:.0f}" for seconds in best]
        print(f"| {columns} -> {rows} | " + " | ".join(speeds) + " |")


def _formats(weight: Tensor) -> list[Matrix]:
    return [plain(weight), plain(weight.bfloat16()), pack(weight, "int8"), pack(weight, "int4")]


def _torch(weight: Tensor, x: Tensor) -> Callable[[], object]:
    return lambda: x @ weight.T


def _ours(matrix: Matrix, x: Tensor) -> Callable[[], object]:
    y, library = torch.empty(len(x), matrix.rows), step_library()
    return lambda: multiply_by(library, matrix, x, y)


def _seconds(way: Callable[[], object]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
