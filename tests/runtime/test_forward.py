"""The forward pass on a CPU without 16-bit matrix instructions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ffnskip.model import forward as module
from ffnskip.model.forward import forward
from tests.support.pico import pico_model, pico_tokens


class _Products(TorchDispatchMode):
    """The dtypes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"):
            self.dtypes.add(args[1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_all_products_are_taken_in_float32_and_what_comes_out_is_as_wide_as_before(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_instructions", lambda dtype: False)
    model, tokens = pico_model(dtype=torch.bfloat16, attn_implementation=attention), pico_tokens(40)
    with torch.no_grad(), _Products() as products:
        found = forward(model, tokens).logits
    assert products.dtypes == {torch.float32}
    assert found.dtype == torch.bfloat16
    with torch.inference_mode():
        expected = model(tokens).logits
    assert (found.float() - expected.float()).norm() < 0.02 * expected.float().norm()


def test_gradients_are_those_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_instructions", lambda dtype: False)
    model, tokens = pico_model(dtype=torch.bfloat16), pico_tokens(40)
    exact = pico_model()
    exact.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    with torch.enable_grad():
        for net in (model, exact):
            forward(net, tokens, labels=tokens).loss.backward()
    for (name, narrow), wide in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert narrow.grad is not None
        assert wide.grad is not None
        assert (narrow.grad.float() - wide.grad).norm() < 0.05 * wide.grad.norm(), name
