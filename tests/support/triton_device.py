"""Where tests run Triton kernels: on the GPU, or else on the CPU in Triton's interpreter (`conftest.py` sees to it)."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ffnskip.model.matrix import Format, Matrix, pack, plain

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
interpreted = pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU does not tell what it reads")


class _Kept:
    """In place of what would undo the interpreter's changes to `triton.language` behind every kernel."""

    def restore(self) -> None:
        pass


def _patch_once() -> None:
    """Let the interpreter make its changes to `triton.language` once for each module with kernels.

    It makes and undoes them with every kernel, and makes them again in every function that a kernel calls, which was a
    third of what the tests take. Nothing here needs the language without them.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch_lang, kept, patched = interpreter._patch_lang, _Kept(), set()

    def patch_lang_once(fn: Callable[..., Any]) -> _Kept:
        if fn.__module__ not in patched:
            patched.add(fn.__module__)
            patch_lang(fn)
        return kept

    interpreter._patch_lang = patch_lang_once


if DEVICE.type == "cpu":
    _patch_once()


class Draw:
    """Seeded random tensors on the device."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(DEVICE)

    def matrix(self, rows: int, columns: int, format: Format = "float32", *, bias: bool = False) -> Matrix:
        weight, offsets = self(rows, columns) / columns**0.5, self(rows) if bias else None
        if format == "float32" or format == "bfloat16":
            return plain(weight.to(getattr(torch, format)), offsets)
        return pack(weight, format, offsets)


def blank(*shape: int) -> Tensor:
    return torch.full(shape, NAN, device=DEVICE)


def near(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result.double(), expected.double(), rtol=1e-4, atol=1e-4)


def normed(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else F.rms_norm(x.double(), x.shape[-1:], weight.double(), eps=1e-6)


def times(matrix: Matrix | None, x: Tensor) -> Tensor:
    """``[batch, rows]`` float64; nothing for no matrix."""
    if matrix is None:
        return torch.zeros(1, dtype=torch.float64, device=DEVICE)
    product = x.double() @ matrix.unpack(torch.float32).double().T
    return product if matrix.bias is None else product + matrix.bias


@contextmanager
def watched_loads() -> Iterator[Callable[[Tensor], bool]]:
    """Tells of memory, whose numbers lie without a gap, whether any of it has been read by a kernel so far."""
    builder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    addresses: list[np.ndarray] = []
    load = builder.create_masked_load

    def watched(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        addresses.append(pointers.data[mask.data].ravel())
        return load(self, pointers, mask, *rest)

    def was_read(tensor: Tensor) -> bool:
        seen, begin = np.concatenate(addresses), tensor.data_ptr()
        return bool(((begin <= seen) & (seen < begin + tensor.nbytes)).any())

    with patch.object(builder, "create_masked_load", watched):
        yield was_read
