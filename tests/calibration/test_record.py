"""What is recorded, against similarities computed by hand, and the two ways of recording against each other."""

from typing import Any

import pytest
import torch
from support.pico import N_LAYERS, pico_model, pico_tokens
from torch import Tensor
from transformers import PreTrainedModel

from ffnskip_cli.calibration.recording.record import Record, record_generated, record_text

PROMPT, NEW = 6, 12


@torch.inference_mode()
def by_hand(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """cos(h, h + f) of one sequence ``[length]`` in a Llama model, ``[length, n_layers]``, by hooks of its own."""
    h: list[Tensor] = []
    f: list[Tensor] = []
    hooks = []
    body: Any = model.model
    for layer in body.layers:
        norm = layer.post_attention_layernorm
        hooks.append(norm.register_forward_pre_hook(lambda module, args: h.append(args[0][0].double())))
        hooks.append(layer.mlp.register_forward_hook(lambda module, args, output: f.append(output[0].double())))
    model(tokens[None])
    for hook in hooks:
        hook.remove()
    columns = [(a * (a + b)).sum(-1) / (a.norm(dim=-1) * (a + b).norm(dim=-1)) for a, b in zip(h, f, strict=True)]
    return torch.stack(columns, dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_is_recorded_token_by_token_and_layer_by_layer(dtype: torch.dtype) -> None:
    model, tokens = pico_model(dtype=dtype), pico_tokens(20, batch=3)
    record = record_text(model, tokens)
    assert torch.equal(record.sequences, tokens)
    assert record.prompt_tokens == 0
    assert record.values.dtype == torch.float32
    expected = torch.stack([by_hand(model, sequence) for sequence in tokens])
    assert torch.allclose(record.values.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi"])
def test_recording_while_generating_sees_what_one_pass_over_the_same_tokens_sees(name: str) -> None:
    model = pico_model(name)
    generated = record_generated(model, pico_tokens(PROMPT, batch=4), NEW)
    teacher_forced = record_text(model, generated.sequences)
    assert generated.values.shape == (4, NEW, N_LAYERS)
    assert generated.prompt_tokens == PROMPT
    assert torch.allclose(generated.values, teacher_forced.values[:, PROMPT:], rtol=0, atol=2e-6)
    assert not torch.allclose(generated.values, teacher_forced.values[:, PROMPT - 1 : -1], atol=1e-3)


def test_generated_sequences_are_the_prompts_and_their_greedy_continuations() -> None:
    model, prompts = pico_model(dtype=torch.float64), pico_tokens(PROMPT, batch=5)
    sequences = record_generated(model, prompts, NEW).sequences
    assert torch.equal(sequences[:, :PROMPT], prompts)
    with torch.inference_mode():
        greedy = model(sequences).logits.argmax(dim=-1)
    assert torch.equal(sequences[:, PROMPT:], greedy[:, PROMPT - 1 : -1])


def test_the_warm_up_is_left_out_of_each_sequence() -> None:
    similarities = torch.rand(70, 5, N_LAYERS)
    record = Record(torch.zeros(70, 8), similarities)
    past = torch.cat([sequence[3:] for sequence in similarities])
    assert torch.equal(torch.cat([chunk.flatten(0, 1) for chunk in record.chunks(3)]), past)
    assert torch.equal(torch.stack(list(record.layers(3)), dim=1), past)


def test_a_recorded_model_is_left_as_it_was() -> None:
    model, tokens = pico_model(), pico_tokens(4)
    record_text(model, tokens)
    record_generated(model, tokens, 2)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
