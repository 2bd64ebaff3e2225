"""Where tests run Triton kernels: on the GPU, or else on the CPU in Triton's interpreter (`conftest.py` sees to it)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ffnskip.model.matrix import Format, Matrix, pack, plain

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")


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
