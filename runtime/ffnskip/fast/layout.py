"""Where a model's matrices lie in memory: in the order in which a step reads them, and so that reading is fast.

Modules keep working: their tensors are re-pointed, not replaced, and nothing is held twice for longer than one tensor
takes to copy.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from ffnskip.model.matrix import Matrix
from ffnskip.model.packed import PackedLinear
from ffnskip.pages import huge, settle, settled

_ALIGNMENT = 64  # bytes, a cache line
_COPIES = ("Anonymous:", "Swap:", "Private_Hugetlb:")  # where Linux counts pages that are no longer the file's


@torch.inference_mode(False)  # or the model could never be trained again
@torch.no_grad()
def lay_out(groups: Sequence[Sequence[nn.Module]], *, by_input: bool = False) -> None:
    """Move linear layers next to each other: those of a group without a gap, and the groups one behind the other.

    Matrices lie row by row, one behind the other, which is fastest where all of them is read; or input by input, for
    each input one stretch with the weights of all outputs of the group, where single inputs are left out. The modules
    are then transposed views, whose own products on a CPU are as fast and bit-equal. Packed layers of different formats
    lie apart, as if they were of different groups.

    On a CPU all of them go into huge pages: with pages of 4 KiB a product reads a quarter less per second, as the
    processor keeps looking up where the next page is. On a GPU each group that does not lie so is moved by itself.

    Args:
        groups: layers of one model on one device, `nn.Linear` or `PackedLinear`, in the order in which they are read.
        by_input: which of the two.
    """
    for packed in (linear for group in groups for linear in group if isinstance(linear, PackedLinear)):
        packed.turn(by_input)
    stretches = [stretch for group in groups for stretch in _stretches(group)]
    device = stretches[0][0].device
    moving = [stretch for stretch in stretches if not _lies(stretch, by_input)]
    if not moving:
        return  # laid out before
    for linear in (linear for group in groups for linear in group if by_input):
        if _whole not in linear._state_dict_hooks.values():
            linear.register_state_dict_post_hook(_whole)
    arena, files = None, []
    if device.type == "cpu":
        moving, files = stretches, _mapped_files()
        arena = _Arena(sum(tensor.nbytes + _ALIGNMENT for stretch in stretches for tensor in stretch))
    for stretch in moving:
        old = [tensor.data for tensor in stretch]
        nbytes = sum(tensor.nbytes for tensor in old)
        memory = arena.take(nbytes) if arena else torch.empty(nbytes, dtype=torch.uint8, device=device)
        copies = _copies(old, memory.view(old[0].dtype), by_input and old[0].dim() > 1)
        for tensor, before, copy in zip(stretch, old, copies, strict=True):
            tensor.data = copy
            settle(tensor)
            _forget_pages(before, files)


def _whole(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """Give a saved model its matrices one by one: views that interleave cannot be written to a file."""
    state[prefix + "weight"] = state[prefix + "weight"].contiguous()


def input_stretch(weight: Tensor) -> int:
    """Numbers from one column of a tensor ``[n, columns]`` to the next where it lies column by column; else 0."""
    return 0 if weight.is_contiguous() or weight.dim() != 2 or weight.stride(0) != 1 else weight.stride(1)


def together(matrices: Sequence[Matrix | None]) -> list[Matrix | None]:
    """Copies of the matrices in huge pages, one behind the other."""
    arena = _Arena(sum(matrix.nbytes + 2 * _ALIGNMENT for matrix in matrices if matrix) + _ALIGNMENT)
    return [matrix and matrix.map(arena.copy) for matrix in matrices]


def _stretches(group: Sequence[nn.Module]) -> list[list[Tensor]]:
    """The tensors of a group that belong next to each other: of packed layers, those of one format."""
    packed = [linear for linear in group if isinstance(linear, PackedLinear)]
    if packed:
        alike = [list(run) for _, run in groupby(packed, key=lambda linear: linear.format)]
        return [[getattr(linear, name) for linear in run] for run in alike for name in ("data", "scale")]
    return [[linear.weight for linear in group if isinstance(linear, nn.Linear)]]


def _copies(tensors: Sequence[Tensor], memory: Tensor, by_input: bool) -> list[Tensor]:
    """Copies that fill some memory: one behind the other, or side by side in stretches, one for each column."""
    if by_input:
        whole = memory.view(tensors[0].shape[1], -1, *tensors[0].shape[2:]).transpose(0, 1)
        copies = list(whole.split([len(tensor) for tensor in tensors]))
    else:
        parts = memory.split([tensor.numel() for tensor in tensors])
        copies = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
    return copies


class _Arena:
    """Memory in huge pages, handed out from its beginning to its end."""

    def __init__(self, nbytes: int) -> None:
        self._bytes = huge(nbytes)
        self._used = 0

    def take(self, nbytes: int) -> Tensor:
        """The next so many bytes, from the beginning of a cache line on."""
        begin = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        self._used = begin + nbytes
        return self._bytes[begin : self._used]

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy behind what has been taken so far."""
        return self.take(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _lies(stretch: Sequence[Tensor], by_input: bool) -> bool:
    """Whether tensors lie as they should already: next to each other, and on a CPU in huge pages."""
    if stretch[0].device.type == "cpu" and not all(map(settled, stretch)):
        return False
    apart = sum(map(len, stretch)) if by_input and stretch[0].dim() == 2 else 0
    ends = [tensor.data_ptr() + len(tensor) * tensor.stride(0) * tensor.element_size() for tensor in stretch]
    adjacent = all(tensor.data_ptr() == end for tensor, end in zip(stretch[1:], ends, strict=False))
    return adjacent and all(input_stretch(tensor) == apart for tensor in stretch)


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges of files in memory, in order; of those alone of which no page was written to, and so copied."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return []
    ranges: dict[tuple[int, int], bool] = {}
    for fields in map(str.split, lines):
        if not fields[0].endswith(":"):  # the first line of a range: addresses, rights, offset, device, inode, path
            begin, end = (int(address, 16) for address in fields[0].split("-"))
            ranges[begin, end] = fields[4] != "0"
        elif fields[0] in _COPIES:
            ranges[begin, end] &= fields[1] == "0"
    return sorted(place for place, of_file in ranges.items() if of_file)


def _forget_pages(tensor: Tensor, files: list[tuple[int, int]]) -> None:
    """Let go of the pages of a mapped file. Should anyone still read them, they come back from the file.

    The system goes on caching the file, or the next start would wait for the disk.
    """
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    index = bisect_right(files, (begin, sys.maxsize)) - 1
    if index < 0 or end > files[index][1]:
        return
    first, last = -(-begin // mmap.PAGESIZE), end // mmap.PAGESIZE
    if last > first:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t((last - first) * mmap.PAGESIZE), mmap.MADV_DONTNEED
        )
