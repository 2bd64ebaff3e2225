"""The forward pass on a CPU without 16-bit matrix instructions."""

from __future__ import annotations

import pytest
import torch

from ffnskip.model import forward as module
from ffnskip.model.forward import forward
from tests.support.pico import pico_model, pico_tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_products_in_float32_are_closer_to_float32_and_keep_the_dtype(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_multiplies", lambda dtype: False)
    model, tokens = pico_model(dtype=torch.bfloat16, attn_implementation=attention), pico_tokens(40)
    exact = pico_model(attn_implementation=attention)
    exact.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    with torch.inference_mode():
        found, plain = forward(model, tokens).logits, model(tokens).logits
        expected = exact(tokens).logits
    assert found.dtype == torch.bfloat16
    assert not torch.equal(found, plain)
    assert (found - expected).norm() < 1.1 * (plain - expected).norm()


def test_gradients_are_those_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_multiplies", lambda dtype: False)
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
