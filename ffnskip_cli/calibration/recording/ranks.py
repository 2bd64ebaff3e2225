"""Several processes that share one recording, as `torchrun` starts them.

Each loads the model, records its share of the text, and their shares are added up once, on rank 0, which goes on alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # the others wait for the slowest rank, however slow it is


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work."""

    rank: int = 0
    size: int = 1

    def add_up(self, tensor: Tensor) -> None:
        """Replace the tensor of rank 0 by the sum over all ranks, in place; those of the others are undefined."""
        if self.size > 1:
            dist.reduce(tensor, dst=0)

    def gather(self, facts: T) -> list[T]:
        """The facts of every rank, on every rank."""
        if self.size == 1:
            return [facts]
        everybody: list[T] = [facts] * self.size
        dist.all_gather_object(everybody, facts)
        return everybody

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Meet the other processes that `torchrun` started, if it started this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
        yield Ranks()
        return
    # On the CPU, whatever the model runs on: what is added up lies in main memory, and only once.
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
