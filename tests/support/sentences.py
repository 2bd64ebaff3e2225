"""What sentences must look like, and what they state."""

import re
from collections.abc import Callable

import pytest
import torch

from ffnskip.errors import FfnskipError

# As CUDA, torch on the CPU (Linux, Windows), safetensors' memory map and Python say it.
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to …"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] DefaultCPUAllocator: not enough memory: you tried to allocate …"),
    OSError(12, "Cannot allocate memory"),
    MemoryError(),
]


def sentence(call: Callable[[], object]) -> str:
    """The message of the user error that `call` raises: one line, no full stop."""
    with pytest.raises(FfnskipError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    return message


def numbers(text: str) -> list[str]:
    """The numbers that a sentence states, as they stand there, apart from signs and units."""
    return re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)
