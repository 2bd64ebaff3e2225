"""Matrices times vectors on a CPU, in the formats that they are stored in: what passes over a prompt are made of."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ffnskip.errors import UnsupportedModelError
from ffnskip.fast import structs
from ffnskip.fast.build import step_library
from ffnskip.fast.codes import FORMATS
from ffnskip.fast.layout import input_stretch
from ffnskip.model.forward import has_instructions
from ffnskip.model.matrix import Matrix

_FEW = 4  # vectors, with which a product is a matter of reading the matrix
_MOST = 256  # vectors, above which a processor with 16-bit matrix instructions is faster on unpacked numbers


def multiply(matrix: Matrix, x: Tensor) -> Tensor | None:
    """``x [..., columns] @ W.T + bias``, ``[..., rows]`` in the type of `x`; None where another way is faster."""
    if x.device.type != "cpu" or not x.dim() or x.shape[-1] != matrix.columns:
        return None
    vectors = x.reshape(-1, matrix.columns)
    if not len(vectors) or not _pays(matrix, len(vectors)):  # an expert that no token is sent to has no vectors
        return None
    try:
        library = step_library()
    except UnsupportedModelError:
        return None
    if vectors.dtype != torch.bfloat16:
        vectors = vectors.float()
    multiply_by(library, matrix, vectors := vectors.contiguous(), y := vectors.new_empty(len(vectors), matrix.rows))
    return y.view(*x.shape[:-1], -1).to(x.dtype)


def multiply_by(library: ctypes.CDLL, matrix: Matrix, x: Tensor, y: Tensor) -> None:
    """Write the product of vectors ``[n, columns]`` into ``y [n, rows]``, both in float32 or both in bfloat16."""
    format, at = FORMATS[str(x.dtype).removeprefix("torch.")], structs.pointers(matrix)
    library.ffnskip_multiply(ctypes.byref(at), len(x), x.data_ptr(), y.data_ptr(), format, torch.get_num_threads())


def beats_pytorch(dtype: torch.dtype) -> bool:
    """Whether products with many vectors are faster here than those of PyTorch in such a type, or hardly slower.

    They are written for AVX2, and for AVX-512 with VNNI, and no match for 16-bit matrix instructions.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    written_for = capability == "AVX2" or (capability == "AVX512" and torch.cpu._is_vnni_supported())
    return written_for and (dtype == torch.float32 or not has_instructions(dtype))


def _pays(matrix: Matrix, n: int) -> bool:
    by_input = bool(input_stretch(matrix.data))
    if matrix.data.device.type != "cpu" or not (by_input or matrix.data.is_contiguous()):
        return False
    if matrix.scale is not None:
        return n <= _MOST or not has_instructions(torch.bfloat16)
    if n <= _FEW:
        return not by_input
    return beats_pytorch(torch.bfloat16)
