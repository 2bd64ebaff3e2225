"""What a GGUF file holds, without its vocabulary."""

from __future__ import annotations

import mmap
import struct
from typing import Any

import gguf
import numpy as np

_LONGEST = 1024  # elements of an array that is no vocabulary: such as one number per layer
_Parts = tuple[int, list[Any], list[int], list[Any]]


class GgufTable(gguf.GGUFReader):
    """A file's tensors, mapped into memory, and what it says of itself, but for long arrays.

    These are the vocabulary, its merges and its scores. The class above makes several arrays of each of their elements,
    which takes seconds; here they are stepped over, and read as if they were empty.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> _Parts:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return self._read_by_library(orig_offs, raw_type)
        element, n = struct.unpack_from("<IQ", self.data, orig_offs)
        number, end = self.gguf_scalar_to_np.get(element), orig_offs + 12
        if n <= _LONGEST or (number is None and element != gguf.GGUFValueType.STRING):
            return self._read_by_library(orig_offs, raw_type)
        if number is not None:
            end += n * np.dtype(number).itemsize
        else:
            for _ in range(n):
                (length,) = struct.unpack_from("<Q", self.data, end)
                end += 8 + length
        return end - orig_offs, [], [], []

    def _read_by_library(self, orig_offs: int, raw_type: int) -> _Parts:
        parts: _Parts = super()._get_field_parts(orig_offs, raw_type)
        return parts

    @property
    def architecture(self) -> str:
        """Its name, as the format has it."""
        return str(self.fields["general.architecture"].contents())

    def release(self) -> None:
        """Let go of what has been read of the file: in memory it need not be beside what it became."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.data.base.madvise(mmap.MADV_DONTNEED)
