"""Packed matrices times many vectors on a CPU, as reading a prompt takes: in integers, without unpacking them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ffnskip.fast import structs
from ffnskip.fast.build import step_library
from ffnskip.fast.layout import input_stretch
from ffnskip.model.forward import has_instructions
from ffnskip.model.matrix import Matrix

_MOST = 256  # vectors, above which a processor with 16-bit matrix instructions is faster on unpacked numbers


def multiply(matrix: Matrix, x: Tensor) -> Tensor | None:
    """``x [..., columns] @ W.T + bias``, ``[..., rows]`` in the type of `x`; None where another way is faster."""
    vectors = x.reshape(-1, matrix.columns)
    if not _pays(matrix, len(vectors)):
        return None
    vectors = vectors.float().contiguous()
    y = torch.empty(len(vectors), matrix.rows, dtype=torch.float32)
    at = structs.pointers(matrix)
    step_library().ffnskip_multiply(
        ctypes.byref(at), len(vectors), vectors.data_ptr(), y.data_ptr(), torch.get_num_threads()
    )
    return y.view(*x.shape[:-1], -1).to(x.dtype)


def _pays(matrix: Matrix, n: int) -> bool:
    if matrix.data.device.type != "cpu" or (matrix.format == "int8" and input_stretch(matrix.data)):
        return False
    return n <= _MOST or not has_instructions(torch.bfloat16)
