"""A Hugging Face cache whose keys and values a fused step holds, for as long as nobody looks at them.

Whoever decodes (`model.generate`, a pipeline, a loop of one's own) made the cache and keeps hold of it, so it is the
same object all the time, and only its class changes: `lend` makes an ordinary one a `LentCache`, and that is an
ordinary one again as soon as its layers are asked for, by a pass of the model's own, beam search, `crop`, a copy or
anything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ffnskip.fast.engine import ROOM
from ffnskip.fast.step import FusedStep

if TYPE_CHECKING:
    from ffnskip.fast.engine import FusedEngine
    from ffnskip.fast.fused_model import FusedModel


class LentCache(DynamicCache):
    """See above.

    Attributes:
        engine: made the step.
        step: holds the keys and values.
        is_compileable: asked for at every token; False without a look at the layers.
    """

    is_compileable = False
    engine: FusedEngine
    step: FusedStep

    @property
    def layers(self) -> list[Any]:
        """The layers, for which the cache becomes an ordinary one."""
        taken = self.step.cache
        del self.step, self.engine
        self.__class__ = DynamicCache
        for index, layer in enumerate(self.layers):
            begin = 0
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = taken.length
                begin = max(0, taken.length - layer.sliding_window + 1)
            layer.keys, layer.values = (
                held[index, :, :, begin : taken.length].to(layer.dtype) for held in (taken.keys, taken.values)
            )
        return self.layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens it holds."""
        return self.step.cache.length

    def __reduce_ex__(self, protocol: Any) -> Any:
        _ = self.layers  # a copy is an ordinary cache
        return self.__reduce_ex__(protocol)


def why_not_lent(cache: Any, model: FusedModel, batch: int) -> str | None:
    """Why a step for the model cannot hold what is in a cache, in one sentence; None if it can."""
    if type(cache) is not DynamicCache or cache.offloading:
        return f"The fused decode step does not go on with a {type(cache).__name__} that is not plain and dynamic."
    if cache.layers and len(cache.layers) != len(model.layers):
        return "The key-value cache has other layers than the model."
    if len({layer.get_seq_length() for layer in cache.layers}) > 1:
        return "The layers of the key-value cache hold different numbers of tokens."
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"The fused decode step does not go on with a {type(layer).__name__}."
        if getattr(layer, "record_past", False):
            return "The key-value cache is to give positions back that its window has dropped."
        if layer.is_initialized and not _fits(layer, model, batch):
            return "The key-value cache is of another shape, or on another device, than the fused decode step's."
    return None


def _fits(layer: Any, model: FusedModel, batch: int) -> bool:
    shape = (batch, model.kv_heads, model.head_dim)
    return (
        layer.keys is not None
        and (*layer.keys.shape[:2], *layer.keys.shape[3:]) == shape
        and (layer.keys.device == model.device)
    )


def lend(cache: DynamicCache, engine: FusedEngine, starts: Tensor, more: int = 1) -> None:
    """Let a new step of the engine go on with a cache.

    Args:
        cache: see `why_not_lent`.
        engine: of the model that filled it, or begins it.
        starts: ``[batch]``, how many padding tokens each row has in front.
        more: how many tokens are to follow at once.
    """
    step, fused = engine.step(len(starts), cache.get_seq_length() + more + ROOM // 2), engine.fused
    if cache.get_seq_length() == 0:  # its layers must know their shape and type before anything is given back
        shape = (len(starts), fused.kv_heads, 0, fused.head_dim)
        nothing = torch.empty(shape, dtype=engine.model.dtype, device=fused.device)
        for index in range(len(fused.layers)):
            cache.update(nothing, nothing, index)
    step.cache.fill(cache, starts)
    cache.__class__ = LentCache
    assert isinstance(cache, LentCache)
    cache.engine, cache.step = engine, step
