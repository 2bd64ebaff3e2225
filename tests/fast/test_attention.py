"""The attention of the CPU's step, however heads share their keys and threads share out the work."""

from copy import deepcopy

import pytest
import torch
from support.pico import pico_model, pico_tokens

from ffnskip.fast.engine import FusedEngine

PROMPT, STEPS, PADDING = 5, 12, 3


@pytest.mark.parametrize("threads", [1, 2, 3, 5], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "head_dim"),
    [("llama", 9, 3, 16), ("llama", 7, 1, 12), ("qwen3", 4, 4, 40), ("gemma2", 8, 2, 32), ("olmo2", 6, 2, 16)],
)
@torch.no_grad()
@pytest.mark.usefixtures("threads")
def test_steps_give_the_logits_of_one_pass(
    dtype: torch.dtype, name: str, heads: int, kv_heads: int, head_dim: int
) -> None:
    model = pico_model(
        name, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, hidden_size=heads * head_dim
    ).to(dtype)
    exact = deepcopy(model).float()  # the same rounded weights, and no other rounding
    engine = FusedEngine(model, None)
    text = pico_tokens(PROMPT + STEPS, batch=2)
    mask = torch.ones_like(text)
    mask[1, :PADDING] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = exact(text, attention_mask=mask, position_ids=positions).logits[:, PROMPT:]
    step = engine.step(2, PROMPT + STEPS)
    engine.prefill(text[:, :PROMPT], mask[:, :PROMPT], step)
    no = torch.zeros(2, dtype=torch.bool)
    logits = torch.stack([step(text[:, PROMPT + i], no, no, no).clone() for i in range(STEPS)], dim=1)
    tolerance = 1e-4 if dtype is torch.float32 else 0.05
    assert float((logits - expected).norm() / expected.norm()) < tolerance
