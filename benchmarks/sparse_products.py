"""Products that leave out inputs against whole ones, both of the compiled step, on matrices that no cache holds.

    python benchmarks/sparse_products.py --dtype bfloat16

prints a table as Markdown: time of the row-by-row product that a dense step takes, over the time of the product with
matrices that lie input by input, by the share of inputs that is kept. About 400 MB of matrices take turns, and so do
the kernels. Every product is timed by itself, and the times of the fastest tenth are compared: on a machine that others
use as well, those are the ones that nobody interrupted.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from ffnskip.fast import build
from ffnskip.fast.codes import FORMATS
from ffnskip.fast.layout import input_stretch, together
from ffnskip.fast.structs import Matrix as Struct
from ffnskip.model.matrix import Matrix, pack, plain

SHAPES = [(576, 3072), (1536, 576), (896, 9728), (4864, 896), (1536, 17920), (8960, 1536), (2048, 16384), (8192, 2048)]
KEPT = (1.0, 0.9, 0.7, 0.5, 0.4, 0.3)
_HELD = 400e6  # bytes of matrices
_HARNESS = r"""
#include <chrono>
#include <omp.h>
#include "inputs.h"
#include "team.h"

// Seconds of one product with each of `count` matrices, by `threads` threads, the way that a step makes them.
extern "C" void products(const Matrix* matrices, int count, const float* x, const float* limit, int threads,
                         double* seconds) {
    const int64_t n = matrices[0].rows, width = matrices[0].columns;
    std::vector<float> y(n);
    std::vector<std::vector<float>> sums(threads, std::vector<float>(n));
    std::vector<Kept> kept(threads);
    Barrier barrier(threads);
#pragma omp parallel num_threads(threads)
    {
        const int id = omp_get_thread_num();
        barrier.wait();
        auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < count; i++) {
            const Matrix& w = matrices[i];
            float* to = y.data();
            const auto [first, last] = share(n, id, threads, 4);
            if (w.stretch) {
                int64_t left_out;
                kept[id].list(std::integral_constant<int, 1>(), &x, &limit, width, &left_out);
                const auto [begin, end] = share(kept[id].n, id, threads, AT_ONCE);
                sum_inputs(w, kept[id], begin, end, 1, n, sums[id].data());
                barrier.wait();
                std::fill(to + first, to + last, 0.0f);
                for (int t = 0; t < threads; t++)
                    for (int64_t r = first; r < last; r++) to[r] += sums[t][r];
            } else {
                multiply(w, first, last, 1, &x, rounded(w.format, width, 1, &x), &to);
            }
            barrier.wait();
            const auto now = std::chrono::steady_clock::now();
            if (id == 0) seconds[i] = std::chrono::duration<double>(now - start).count();
            start = now;
        }
    }
}
"""


def main(
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, int8 or int4.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    rounds: Annotated[int, typer.Option(help="Times that each is measured.")] = 9,
) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        library = _compiled(Path(folder))
        print(f"| inputs -> outputs | row by row, GB/s | {' | '.join(f'kept {share}' for share in KEPT)} |")
        print("|---" * (len(KEPT) + 2) + "|")
        for columns, rows in SHAPES:
            speed, ratios = _measure(library, columns, rows, dtype, threads, rounds)
            print(
                f"| {columns} -> {rows} | {speed:.1f} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |", flush=True
            )


def _measure(
    library: ctypes.CDLL, columns: int, rows: int, dtype: str, threads: int, rounds: int
) -> tuple[float, list[float]]:
    """GB/s of the dense product, and the ratio for each of `KEPT`."""
    weight = torch.randn(rows, columns) / columns**0.5
    packed = dtype in ("int8", "int4")
    one = pack(weight, dtype) if packed else plain(weight.to(getattr(torch, dtype)))  # type: ignore[arg-type]
    count = max(2, int(_HELD / one.nbytes))
    copies = [matrix for matrix in together([one] * count) if matrix is not None]
    by_input = one.turned(by_input=True).map(lambda tensor: _turned(tensor).contiguous())
    turned = [matrix.map(_turned) for matrix in together([by_input] * count) if matrix is not None]
    dense, sparse = _structs(copies), _structs(turned)
    x = torch.rand(columns)
    seconds = {share: torch.empty(rounds, count, dtype=torch.float64) for share in (None, *KEPT)}
    for index in range(rounds):
        for share, times in seconds.items():
            limit = torch.full((columns,), float(x.sort().values[columns - round((share or 1.0) * columns)]))
            matrices = sparse if share else dense
            library.products(matrices, count, _at(x), _at(limit), threads, _at(times[index]))
    fastest = {share: float(times.quantile(0.1)) for share, times in seconds.items()}
    return one.nbytes / fastest[None] / 1e9, [fastest[None] / fastest[share] for share in KEPT]


def _turned(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1) if tensor.dim() > 1 else tensor


def _structs(matrices: list[Matrix]) -> ctypes.Array[Struct]:
    return (Struct * len(matrices))(
        *(
            Struct(
                m.data.data_ptr(),
                None if m.scale is None else m.scale.data_ptr(),
                None,
                m.rows,
                m.columns,
                input_stretch(m.data) * (2 if m.by_input else 1),
                FORMATS[m.format],
            )
            for m in matrices
        )
    )


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _compiled(folder: Path) -> ctypes.CDLL:
    (folder / "harness.cpp").write_text(_HARNESS)
    command = ["c++", *build._FLAGS, *build._vector_flags(), *build._THREADS]
    command += [f"-I{build._SOURCES}", str(folder / "harness.cpp"), "-o", str(folder / "harness.so")]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "harness.so"))
    return library


if __name__ == "__main__":
    typer.run(main)
