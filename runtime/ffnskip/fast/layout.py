"""Where a model's matrices lie in memory: in the order in which a step reads them, and so that reading is fast.

Modules keep working: their tensors are re-pointed, not replaced, and nothing is held twice for longer than one tensor
takes to copy.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ffnskip.model.matrix import Matrix
from ffnskip.model.packed import PackedLinear

_ALIGNMENT = 64  # bytes, a cache line
_MADV_PAGEOUT = 21  # Linux; Python's mmap has no name for it
_arenas: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by address, as long as a tensor lies in them


@torch.inference_mode(False)  # or the model could never be trained again
@torch.no_grad()
def lay_out(groups: Sequence[Sequence[nn.Module]], *, by_input: bool = False) -> None:
    """Move linear layers next to each other: those of a group without a gap, and the groups one behind the other.

    Matrices lie row by row, one behind the other, which is fastest where all of them is read; or input by input, for
    each input one stretch with the weights of all outputs of the group, where single inputs are left out. The modules
    are then transposed views, whose own products are as fast and bit-equal.

    On a CPU all of them go into huge pages: with pages of 4 KiB a product reads a quarter less per second, as the
    processor keeps looking up where the next page is. On a GPU each group is moved by itself.

    Args:
        groups: layers of one model on one device, `nn.Linear` or `PackedLinear`, in the order in which they are read.
        by_input: which of the two, on a CPU; elsewhere row by row.
    """
    stretches = [stretch for group in groups for stretch in _stretches(group)]
    if stretches[0][0].device.type != "cpu":
        for stretch in stretches:
            _join(stretch)
        return
    if all(_lies(stretch, by_input) for stretch in stretches):
        return  # laid out before
    for linear in (linear for group in groups for linear in group if by_input):
        if _whole not in linear._state_dict_hooks.values():
            linear.register_state_dict_post_hook(_whole)
    arena = _Arena(sum(tensor.nbytes + _ALIGNMENT for stretch in stretches for tensor in stretch))
    files = _mapped_files()
    for stretch in stretches:
        old = [tensor.data for tensor in stretch]
        copies = arena.copy_by_input(old) if by_input and old[0].dim() == 2 else arena.copy_rows(old)
        for tensor, before, copy in zip(stretch, old, copies, strict=True):
            tensor.data = copy
            _forget_pages(before, files)


def _whole(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """Give a saved model its matrices one by one: views that interleave cannot be written to a file."""
    state[prefix + "weight"] = state[prefix + "weight"].contiguous()


def input_stretch(weight: Tensor) -> int:
    """Numbers from one input of a matrix ``[rows, columns]`` to the next where it lies input by input; else 0."""
    return 0 if weight.is_contiguous() or weight.dim() != 2 or weight.stride(0) != 1 else weight.stride(1)


def together(matrices: Sequence[Matrix | None]) -> list[Matrix | None]:
    """Copies of the matrices in huge pages, one behind the other."""
    arena = _Arena(sum(matrix.nbytes + 2 * _ALIGNMENT for matrix in matrices if matrix) + _ALIGNMENT)
    return [matrix and matrix.map(lambda tensor: arena.copy(tensor, aligned=True)) for matrix in matrices]


def _stretches(group: Sequence[nn.Module]) -> list[list[Tensor]]:
    """The tensors of a group that belong next to each other."""
    packed = [linear for linear in group if isinstance(linear, PackedLinear)]
    if packed:
        data, scale = ([getattr(linear, name) for linear in packed] for name in ("data", "scale"))
        return [data, scale]
    return [[linear.weight for linear in group if isinstance(linear, nn.Linear)]]


def _join(tensors: list[Tensor]) -> None:
    ends = [tensor.data_ptr() + tensor.nbytes for tensor in tensors]
    plain = all(tensor.is_contiguous() for tensor in tensors)  # a model may come from a CPU, laid out input by input
    if plain and all(tensor.data_ptr() == end for tensor, end in zip(tensors[1:], ends, strict=False)):
        return
    whole = torch.cat([tensor.data for tensor in tensors])
    for tensor, part in zip(tensors, whole.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.data = part


class _Arena:
    """Memory in huge pages where the system has them, handed out from its beginning to its end."""

    def __init__(self, nbytes: int) -> None:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
        else:
            memory = mmap.mmap(-1, nbytes)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._used = 0
        _arenas[self._bytes.data_ptr()] = memory

    def copy(self, tensor: Tensor, *, aligned: bool) -> Tensor:
        return self._take(tensor.nbytes, aligned).view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def _take(self, nbytes: int, aligned: bool) -> Tensor:
        if aligned:
            self._used = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        begin, self._used = self._used, self._used + nbytes
        return self._bytes[begin : self._used]

    def copy_rows(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies, one behind the other."""
        return [self.copy(tensor, aligned=index == 0) for index, tensor in enumerate(tensors)]

    def copy_by_input(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Transposed views ``[rows, columns]`` of copies that lie side by side in stretches, one for each column."""
        whole = self._take(sum(matrix.nbytes for matrix in matrices), aligned=True).view(matrices[0].dtype)
        whole = whole.view(matrices[0].shape[1], -1)
        views = list(whole.T.split([len(matrix) for matrix in matrices]))
        for view, matrix in zip(views, matrices, strict=True):
            view.copy_(matrix)
        return views


def in_arena(tensor: Tensor) -> bool:
    """Whether it was moved by `lay_out`."""
    return tensor.untyped_storage().data_ptr() in _arenas


def _lies(stretch: Sequence[Tensor], by_input: bool) -> bool:
    """Whether tensors that belong next to each other have been laid out so already."""
    return all(map(in_arena, stretch)) and all(bool(input_stretch(t)) == (by_input and t.dim() == 2) for t in stretch)


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges of files in memory, in order."""
    try:
        lines: Iterable[str] = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    fields = (line.split() for line in lines)
    return sorted(tuple(int(end, 16) for end in f[0].split("-")) for f in fields if f[4] != "0")  # type: ignore[misc]


def _forget_pages(tensor: Tensor, files: list[tuple[int, int]]) -> None:
    """Let the system drop the pages of a mapped file from memory; should anyone still read them, they come back."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    index = bisect_right(files, (begin, sys.maxsize)) - 1
    if index < 0 or end > files[index][1]:
        return
    first, last = -(-begin // mmap.PAGESIZE), end // mmap.PAGESIZE
    if last > first:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t((last - first) * mmap.PAGESIZE), _MADV_PAGEOUT
        )
