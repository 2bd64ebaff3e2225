"""Memory in huge pages, where the system has them, and which tensors were put there to stay."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_addresses = WeakTensorKeyDictionary()  # where each tensor was put


def huge(nbytes: int) -> Tensor:
    """So many bytes, zero. They go back to the system when no tensor is in them, which those of malloc may not.

    Raises:
        MemoryError: there is no room for them.
    """
    try:
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MADV_HUGEPAGE") else {}
        memory = mmap.mmap(-1, nbytes, **private)
    except OSError as error:
        raise MemoryError(f"cannot allocate {nbytes} bytes") from error
    if private:
        with suppress(OSError):  # a system without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def settle(tensor: Tensor) -> Tensor:
    """Remember where a tensor is, as one of those that lie in huge pages."""
    _addresses[tensor] = tensor.data_ptr()
    return tensor


def settled(tensor: Tensor) -> bool:
    """Whether it lies where it was when it settled."""
    return bool(_addresses.get(tensor) == tensor.data_ptr())
