"""A decoder of the Llama family as plain numbers: what a fused decode step needs to know of it, and nothing else.

One description fits them all. A layer computes, for the residual stream ``h``,

    h = h + norm(attention(norm(h)))
    h = h + norm(down(act(gate(norm(h))) * up(norm(h))))

where each norm may be absent: Gemma 2 and 3 have all four, OLMo 2 those behind the blocks, others those in front. The
families differ in numbers (scales, caps, windows, tables of rotary positions) and in what is absent
(`ffnskip.fast.families`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ffnskip.model.matrix import Matrix, stack

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, eq=False)
class Rope:
    """A rotary embedding: at position ``p``, channels ``i`` and ``i + n`` of a head turn by ``p * frequencies[i]``.

    Attributes:
        frequencies: ``[n]`` float32, in radians; zeros turn nothing, for layers without positions (SmolLM3).
        scale: of cosines and sines.
    """

    frequencies: Tensor
    scale: float

    def turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines at some positions ``[length]``, ``[length, 2 * n]`` float32 each."""
        angles = torch.outer(positions.float(), self.frequencies).repeat(1, 2)
        return angles.cos() * self.scale, angles.sin() * self.scale


@dataclass(frozen=True, eq=False)
class FusedLayer:
    """One decoder layer. Norm weights are ``[hidden]`` float32; for those of heads see `FusedModel.norm_across_heads`.

    Attributes:
        q: query projection, ``[heads * head_dim, hidden]``.
        k, v: key and value projection, ``[kv_heads * head_dim, hidden]``.
        out: ``[hidden, heads * head_dim]``.
        gate, up: of the FFN, ``[intermediate, hidden]``.
        down: ``[hidden, intermediate]``.
        norm_attention, norm_ffn: in front of the two blocks.
        after_attention, after_ffn: behind them.
        q_norm, k_norm: of each head's query and key.
        window: how many positions attention sees, this one included; None for all.
        rope: which of the model's rotary tables it uses.
    """

    q: Matrix
    k: Matrix
    v: Matrix
    out: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    norm_attention: Tensor | None
    norm_ffn: Tensor | None
    after_attention: Tensor | None
    after_ffn: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int | None
    rope: int

    @property
    def qkv(self) -> Matrix:
        """Query, key and value projection as one matrix, without a copy as they lie side by side."""
        return stack([self.q, self.k, self.v])

    @property
    def gate_up(self) -> Matrix:
        """Gate, then up projection as one matrix ``[2 * intermediate, hidden]``, without a copy either."""
        return stack([self.gate, self.up])


@dataclass(frozen=True, eq=False)
class FusedModel:
    """A decoder's weights as a decode step reads them, shared with the model they came from.

    Attributes:
        layers: in order.
        embedding: ``[vocabulary, hidden]``; multiplied by `embedding_scale` when looked up.
        norm: in front of the output head, ``[hidden]`` float32.
        head: ``[vocabulary, hidden]``.
        heads, kv_heads, head_dim: of attention.
        eps: of all norms.
        attention_scale: what query times key is multiplied with.
        residual_scale: what a block adds is multiplied with.
        logit_scale: what the logits are multiplied with.
        norm_across_heads: `q_norm` is one norm across all heads, ``[heads * head_dim]``, as is `k_norm`; else it is of
            each head, ``[head_dim]``.
        attention_cap, logit_cap: ``cap * tanh(x / cap)`` bounds scores and logits; None where they are not.
        activation: of the gate.
        max_length: the longest sequence that the rotary tables hold for.
        ropes: the rotary embeddings that layers have, all for the same channels.
        dtype: the model's, of what is not packed.
    """

    layers: list[FusedLayer]
    embedding: Matrix
    norm: Tensor
    head: Matrix
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    attention_scale: float
    attention_cap: float | None
    logit_cap: float | None
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    norm_across_heads: bool
    activation: Activation
    max_length: int
    ropes: tuple[Rope, ...]
    dtype: torch.dtype

    @property
    def hidden(self) -> int:
        """Size of the residual stream."""
        return self.embedding.columns

    @property
    def intermediate(self) -> int:
        """Neurons of an FFN."""
        return self.layers[0].down.columns

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return self.head.rows

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm.device

    @torch.inference_mode()
    def rotary_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 to `length` - 1, ``[tables, length, rotary_dim]`` float32 each."""
        positions = torch.arange(length, device=self.device)
        cos, sin = zip(*(rope.turns(positions) for rope in self.ropes), strict=True)
        return torch.stack(cos), torch.stack(sin)
