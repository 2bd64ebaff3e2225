"""Attention's Triton kernels against plain float64; slots of the cache that nobody may see are poisoned with NaN."""

from typing import Any

import pytest
import torch
from support.triton_device import DEVICE, NAN, Draw, blank, near, normed
from torch import Tensor

from ffnskip.fast.cuda import kernels_attention


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[heads, head_dim]`` with the first dimensions rotated, as in Hugging Face's decoders."""
    turned, rest = x[:, : len(cos)], x[:, len(cos) :]
    left, right = turned.chunk(2, dim=1)
    return torch.cat([turned * cos + torch.cat([-right, left], dim=1) * sin, rest], dim=1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary", "window", "cap", "norms"),
    [
        (2, 2, 8, 8, None, None, False),
        (6, 2, 8, 8, 9, None, True),
        (4, 1, 12, 6, None, 2.0, False),
    ],
    ids=["plain", "grouped-window-norms", "one-key-cap-partly-rotated"],
)
@pytest.mark.parametrize("last", [4, 290])
def test_attention_sees_what_it_should_and_nothing_else(
    heads: int, kv_heads: int, head_dim: int, rotary: int, window: int | None, cap: float | None, norms: bool, last: int
) -> None:
    draw, batch, capacity, scale = Draw(), 2, 300, 0.4
    starts = torch.tensor([0, 3], device=DEVICE)
    qkv, attended = draw(batch, (heads + 2 * kv_heads) * head_dim), blank(batch, heads * head_dim)
    q_norm, k_norm = (draw(head_dim) if norms else None for _ in range(2))
    cos, sin = draw(capacity, rotary), draw(capacity, rotary)
    keys, values = draw(batch, kv_heads, capacity, head_dim), draw(batch, kv_heads, capacity, head_dim)
    first = [max(int(start), 0 if window is None else last + 1 - window) for start in starts]
    for row in range(batch):
        for tensor in (keys, values):
            tensor[row, :, : first[row]] = NAN
            tensor[row, :, last:] = NAN
    position = torch.tensor([last], device=DEVICE)

    q, n_splits = blank(batch, heads, head_dim), kernels_attention.splits(capacity)
    partial, weight = blank(batch, heads, n_splits, head_dim), blank(2, batch, heads, n_splits)
    assert n_splits == 3
    cache = kernels_attention.LayerCache(keys, values, position, starts)
    norms_of_heads: Any = {"q_norm": q_norm, "k_norm": k_norm, "eps": 1e-6}
    kernels_attention.rotate(qkv, q, cache, cos=cos, sin=sin, scale=scale, **norms_of_heads)
    kernels_attention.attend(q, cache, partial, weight, window=window, cap=cap)
    kernels_attention.merge(partial, weight, attended)

    for row in range(batch):
        query, key, value = (
            qkv[row].double().view(-1, head_dim).split([heads, kv_heads, kv_heads])  # type: ignore[no-untyped-call]
        )
        index = last - int(starts[row])
        query = rotated(normed(query, q_norm), cos[index].double(), sin[index].double())
        key = rotated(normed(key, k_norm), cos[index].double(), sin[index].double())
        near(keys[row, :, last], key)
        near(values[row, :, last], value)
        seen = slice(first[row], last + 1)
        all_keys, all_values = (t[row, :, seen].double() for t in (keys, values))
        for head in range(heads):
            of = head // (heads // kv_heads)
            score = all_keys[of] @ query[head] * scale
            score = score if cap is None else cap * (score / cap).tanh()
            expected = score.softmax(dim=0) @ all_values[of]
            near(attended.view(batch, heads, head_dim)[row, head], expected)
