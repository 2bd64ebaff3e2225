# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803
"""Triton kernels: attention of one new token per row to the static cache.

The position is read from the device, so that the same launches serve every token. The slots of the cache are shared out
among programs, whose partial results are then merged; programs whose slots are empty or out of sight return at once.

Experimental: see `cuda_step`.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

_SPAN, _MOST_SPLITS = 128, 64  # slots per program; programs per head, before they get more slots
_ELEMENTS = 8192  # of keys or values times query heads that a program holds at a time


@dataclass(frozen=True, eq=False)
class LayerCache:
    """One layer of the key-value cache, and where in it a token goes.

    Attributes:
        keys, values: ``[batch, kv_heads, capacity, head_dim]``.
        position: ``[1]`` int64, the slot of this token.
        starts: ``[batch]`` int64, the first slot of each row.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    starts: Tensor


def splits(capacity: int) -> int:
    """Among how many programs the slots of a cache are shared out."""
    return int(triton.cdiv(capacity, _span(capacity)))


def rotate(
    qkv: Tensor,
    q: Tensor,
    cache: LayerCache,
    *,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    scale: float,
) -> None:
    """Norm and rotate queries and keys, and write keys and values into the cache.

    Args:
        qkv: ``[batch, (heads + 2 * kv_heads) * head_dim]`` float32.
        q: ``[batch, heads, head_dim]`` float32, written: rotated and multiplied with `scale`.
        cache: where keys and values are written.
        cos, sin: ``[capacity, rotary_dim]`` float32; dimensions of a head past those are not rotated.
        q_norm, k_norm: ``[head_dim]`` float32, or None.
        eps: of the norms.
        scale: of the queries.
    """
    batch, heads, head_dim = q.shape
    kv_heads, capacity = cache.keys.shape[1:3]
    _rotate_kernel[(batch, kv_heads)](
        qkv, q, cache.keys, cache.values, cache.position, cache.starts, cos, sin, q_norm, k_norm, eps, scale, capacity,
        ROTARY=cos.shape[1], **_shape(heads, kv_heads, head_dim),
    )  # fmt: skip


def attend(
    q: Tensor, cache: LayerCache, partial: Tensor, weight: Tensor, *, window: int | None, cap: float | None
) -> None:
    """Attend to the slots of each program.

    Args:
        q: ``[batch, heads, head_dim]`` float32, scaled.
        cache: filled up to its position.
        partial: ``[batch, heads, splits, head_dim]`` float32, written: sums of values times ``exp(score - top)``.
        weight: ``[2, batch, heads, splits]`` float32, written: `top`, the highest score, and the sum of weights.
        window: how many slots are seen; None for all.
        cap: of the scores, or None.
    """
    batch, heads, head_dim = q.shape
    kv_heads, capacity = cache.keys.shape[1:3]
    shape = _shape(heads, kv_heads, head_dim)
    slots = max(1, _ELEMENTS // (shape["GROUP"] * shape["WIDTH"]))
    _attend_kernel[(batch, kv_heads, partial.shape[2])](
        q, cache.keys, cache.values, cache.position, cache.starts, partial, weight[0], weight[1],
        capacity, _span(capacity), WINDOW=window, CAP=cap, SLOTS=slots, **shape,
    )  # fmt: skip


def merge(partial: Tensor, weight: Tensor, attended: Tensor) -> None:
    """Merge what `attend` left into ``attended [batch, heads * head_dim]`` float32."""
    batch, heads, n_splits, head_dim = partial.shape
    sizes = {"SPLITS": triton.next_power_of_2(n_splits), "WIDTH": triton.next_power_of_2(head_dim)}
    _merge_kernel[(batch * heads,)](partial, weight[0], weight[1], attended, n_splits, head_dim, **sizes)


def _span(capacity: int) -> int:
    return max(_SPAN, int(triton.cdiv(capacity, _MOST_SPLITS)))


def _shape(heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    """GROUP and WIDTH are powers of two that hold a key's query heads and a head's dimensions."""
    group = heads // kv_heads
    sizes = {"GROUP": triton.next_power_of_2(group), "WIDTH": triton.next_power_of_2(head_dim)}
    return {"KV_HEADS": kv_heads, "HEADS_PER_KEY": group, "HEAD_DIM": head_dim, **sizes}


@triton.jit
def _rotate_kernel(
    qkv, q, keys, values, position, starts, cos, sin, q_norm, k_norm, eps, scale, capacity,
    ROTARY: tl.constexpr, KV_HEADS: tl.constexpr, HEADS_PER_KEY: tl.constexpr, HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, key_head = tl.program_id(0), tl.program_id(1)
    heads: tl.constexpr = KV_HEADS * HEADS_PER_KEY
    slot = tl.load(position)
    column = tl.arange(0, WIDTH)[None, :]
    table = (slot - tl.load(starts + row)) * ROTARY + column
    c = tl.load(cos + table, mask=column < ROTARY, other=1.0)
    s = tl.load(sin + table, mask=column < ROTARY, other=0.0)
    line = qkv + row * (heads + 2 * KV_HEADS) * HEAD_DIM

    member = tl.arange(0, GROUP)[:, None]
    head = key_head * HEADS_PER_KEY + member
    mask = (member < HEADS_PER_KEY) & (column < HEAD_DIM)
    query = _rotated(line + head * HEAD_DIM, q_norm, column, mask, c, s, eps, ROTARY, HEAD_DIM)
    tl.store(q + (row * heads + head) * HEAD_DIM + column, query * scale, mask=mask)

    kv_head = tl.arange(0, 1)[:, None] + key_head
    mask = (kv_head < KV_HEADS) & (column < HEAD_DIM)
    key = _rotated(line + (heads + kv_head) * HEAD_DIM, k_norm, column, mask, c, s, eps, ROTARY, HEAD_DIM)
    value = tl.load(line + (heads + KV_HEADS + kv_head) * HEAD_DIM + column, mask=mask)
    cell = ((row * KV_HEADS + kv_head) * capacity + slot) * HEAD_DIM + column
    tl.store(keys + cell, key.to(keys.dtype.element_ty), mask=mask)
    tl.store(values + cell, value.to(values.dtype.element_ty), mask=mask)


@triton.jit
def _rotated(line, norm, column, mask, c, s, eps, ROTARY: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Heads ``[.., WIDTH]`` with their norm and rotation. Each dimension is turned with one half the others away."""
    first = column < ROTARY // 2
    other = tl.where(first, column + ROTARY // 2, tl.where(column < ROTARY, column - ROTARY // 2, column))
    x = tl.load(line + column, mask=mask, other=0.0)
    y = tl.load(line + other, mask=mask, other=0.0)
    if norm is not None:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / HEAD_DIM + eps)
        x *= inverse * tl.load(norm + column, mask=column < HEAD_DIM, other=0.0)
        y *= inverse * tl.load(norm + other, mask=column < HEAD_DIM, other=0.0)
    return x * c + tl.where(first, -y, y) * s


@triton.jit
def _attend_kernel(
    q, keys, values, position, starts, partial, tops, sums, capacity, span,
    WINDOW: tl.constexpr, CAP: tl.constexpr, SLOTS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS_PER_KEY: tl.constexpr,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, key_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    last = tl.load(position)
    begin = tl.maximum(tl.load(starts + row), split * span)
    if WINDOW is not None:
        begin = tl.maximum(begin, last + 1 - WINDOW)
    end = tl.minimum(last + 1, (split + 1) * span)

    member = tl.arange(0, GROUP)
    head = row * KV_HEADS * HEADS_PER_KEY + key_head * HEADS_PER_KEY + member
    column = tl.arange(0, WIDTH)
    mask = (member < HEADS_PER_KEY)[:, None] & (column < HEAD_DIM)[None, :]
    query = tl.load(q + head[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0.0)
    line = (row * KV_HEADS + key_head).to(tl.int64) * capacity * HEAD_DIM

    top = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    sums_of_values = tl.zeros((GROUP, WIDTH), tl.float32)
    for start in tl.range(begin, end, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        cell = line + slot[:, None] * HEAD_DIM + column[None, :]
        there = (slot < end)[:, None] & (column < HEAD_DIM)[None, :]
        key = tl.load(keys + cell, mask=there, other=0.0).to(tl.float32)
        value = tl.load(values + cell, mask=there, other=0.0).to(tl.float32)
        score = tl.sum(query[:, None, :] * key[None, :, :], axis=2)
        if CAP is not None:  # tanh x is 2 sigmoid(2 x) - 1
            score = CAP * (2.0 * tl.sigmoid(2.0 / CAP * score) - 1.0)
        score = tl.where((slot < end)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp(score - higher[:, None])
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(weight, axis=1)
        sums_of_values = sums_of_values * fade[:, None] + tl.sum(weight[:, :, None] * value[None, :, :], axis=1)
        top = higher

    part = head * tl.num_programs(2) + split
    tl.store(tops + part, top, mask=member < HEADS_PER_KEY)
    tl.store(sums + part, total, mask=member < HEADS_PER_KEY)
    tl.store(partial + part[:, None] * HEAD_DIM + column[None, :], sums_of_values, mask=mask)


@triton.jit
def _merge_kernel(partial, tops, sums, attended, n_splits, head_dim, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    head = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, WIDTH)
    there = split < n_splits
    part = head * n_splits + split
    top = tl.load(tops + part, mask=there, other=float("-inf"))
    fade = tl.exp(top - tl.max(top, axis=0))
    total = tl.sum(fade * tl.load(sums + part, mask=there, other=0.0), axis=0)
    inside = column < head_dim
    mask = there[:, None] & inside[None, :]
    values = tl.load(partial + part[:, None] * head_dim + column[None, :], mask=mask, other=0.0)
    tl.store(attended + head * head_dim + column, tl.sum(fade[:, None] * values, axis=0) / total, mask=inside)
