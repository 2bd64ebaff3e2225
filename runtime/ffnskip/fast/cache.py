"""The static key-value cache of a decode: allocated once, written in place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.fast.fused_model import FusedModel
from ffnskip.pages import huge

if TYPE_CHECKING:
    from transformers import DynamicCache


@dataclass(eq=False)
class KeyValueCache:
    """Keys and values of all layers; every row of a batch has one slot per token, and all rows use the same slot.

    Attributes:
        keys, values: ``[layers, batch, kv_heads, capacity, head_dim]``, keys with their rotary positions applied.
        starts: ``[batch]`` int64, the first slot that is no padding; a token's position is its slot minus this.
        length: how many slots are filled.
    """

    keys: Tensor
    values: Tensor
    starts: Tensor
    length: int = 0

    @classmethod
    def allocate(cls, model: FusedModel, batch: int, capacity: int, dtype: torch.dtype) -> KeyValueCache:
        """An empty one on the model's device, for `capacity` tokens per row."""
        shape = (len(model.layers), batch, model.kv_heads, capacity, model.head_dim)
        keys, values = (_zeros(shape, dtype, model.device) for _ in range(2))
        return cls(keys, values, torch.zeros(batch, dtype=torch.int64, device=model.device))

    def grown(self, capacity: int) -> KeyValueCache:
        """A copy with room for `capacity` tokens per row."""
        shape = (*self.keys.shape[:3], capacity, self.keys.shape[4])
        keys, values = (_zeros(shape, old.dtype, old.device) for old in (self.keys, self.values))
        keys[:, :, :, : self.capacity], values[:, :, :, : self.capacity] = self.keys, self.values
        return KeyValueCache(keys, values, self.starts, self.length)

    @property
    def batch(self) -> int:
        """How many sequences it holds."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """How many tokens of each."""
        return self.keys.shape[3]

    def fill(self, past: DynamicCache, starts: Tensor) -> None:
        """Take over what reading the prompts left behind, layer by layer, so that little is held twice.

        Args:
            past: its layers are emptied. Positions that a layer with a window has dropped are seen by no later token.
            starts: ``[batch]``, how many padding tokens each prompt has in front.
        """
        self.length = past.get_seq_length()
        for index, layer in enumerate(past.layers):
            kept = slice(self.length - layer.keys.shape[2], self.length)
            self.keys[index, :, :, kept] = layer.keys
            self.values[index, :, :, kept] = layer.values
            layer.keys = layer.values = None
        self.starts.copy_(starts)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU in huge pages, where reading many positions of one head is faster."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return huge(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
