"""Prompts that a step reads by itself: the cache and the logits are those that the model's own forward pass gives."""

from typing import Any

import pytest
import torch
from support.compiler import needs_compiler
from support.pico import pack_in_turns, pico_model, pico_tokens
from support.price import price_profile
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ffnskip import Decoder, FfnskipError, Profile, accelerate, apply, pack_weights
from ffnskip.fast import engine
from ffnskip.fast.cpu_step import CpuStep
from ffnskip.fast.engine import FusedEngine
from ffnskip.fast.families import FAMILIES
from ffnskip.fast.step import FusedStep

pytestmark = needs_compiler

LENGTH, PADDING = 300, 7  # of two prompts, which are read in chunks of less, and in more than one


def model_of(name: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    return pico_model(name, dtype, max_position_embeddings=512, **config)


@torch.inference_mode()
def both_ways(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, profile: Profile | None = None
) -> list[tuple[Tensor, FusedStep]]:
    """Logits and step, of prompts that the step reads and of such that the model's own forward pass reads."""
    fused = FusedEngine(model, profile)
    text = pico_tokens(LENGTH, batch=2)
    mask = torch.ones_like(text)
    mask[1, :PADDING] = 0
    results = []
    for reads in (True, False):
        monkeypatch.setattr(FusedEngine, "reads_prompts", lambda self, length, reads=reads: reads)
        step = fused.step(2, LENGTH)
        results.append((fused.prefill(text, mask, step).clone(), step))
    return results


def assert_alike(results: list[tuple[Tensor, FusedStep]], tolerance: float) -> None:
    (logits, step), (expected, other) = results
    pairs = [(logits, expected)]
    for row, start in enumerate((0, PADDING)):
        seen = slice(start, LENGTH)
        for mine, its in ((step.cache.keys, other.cache.keys), (step.cache.values, other.cache.values)):
            pairs.append((mine[:, row, :, seen], its[:, row, :, seen]))
    for mine, its in pairs:
        assert float((mine.float() - its.float()).norm() / its.float().norm()) < tolerance
    assert step.cache.length == other.cache.length == LENGTH
    assert torch.equal(step.cache.starts, other.cache.starts)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("threads")
def test_every_family(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_alike(both_ways(model_of(name), monkeypatch), 1e-4)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 16), (7, 1, 12), (4, 4, 40), (144, 1, 8)])
def test_heads_share_keys(heads: int, kv_heads: int, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    assert_alike(both_ways(model_of(hidden_size=heads * head_dim, **shape), monkeypatch), 1e-4)


@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4", "in turns", "some"])
def test_every_format_and_layout(format: str, by_input: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_key_value_heads": 4, "head_dim": 16}
    model = model_of("qwen2", torch.bfloat16 if format == "bfloat16" else torch.float32, **shape)
    kept = model.model.layers[1].self_attn.k_proj
    if format in ("int8", "int4"):
        pack_weights(model, format)  # type: ignore[arg-type]
    elif format == "in turns":
        pack_in_turns(model)
    elif format == "some":  # as in files whose small matrices are not quantized
        pack_weights(model, "int8")
        model.model.layers[1].self_attn.k_proj = kept
    profile = price_profile(model) if by_input else None
    tolerance = 1e-4 if format == "float32" else 2e-3
    assert_alike(both_ways(model, monkeypatch, profile), 0.05 if format == "bfloat16" else tolerance)


def test_one_token_is_a_prompt_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    monkeypatch.setattr(FusedEngine, "reads_prompts", lambda self, length: True)
    fused = FusedEngine(model, None)
    logits = fused.prefill(pico_tokens(1), None, fused.step(1, 8))
    assert torch.allclose(logits, model(pico_tokens(1)).logits[:, -1], atol=1e-4)


def test_decoding_leaves_the_prompt_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedEngine, "reads_prompts", lambda self, length: True)
    model, text = model_of(), pico_tokens(40)
    expected = model.generate(text, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 40:]
    decoder = Decoder(model)
    monkeypatch.setattr(engine, "forward", None)  # the model's own, which is not asked
    assert torch.cat(list(decoder.decode(text, max_new_tokens=8))).tolist() == expected.tolist()


def test_generate_leaves_prompts_to_the_step_where_it_asks_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedEngine, "reads_prompts", lambda self, length: True)
    read: list[tuple[int, ...]] = []
    own = CpuStep.read
    monkeypatch.setattr(CpuStep, "read", lambda self, *args: read.append(args[0].shape) or own(self, *args))
    model, text = model_of("qwen3"), pico_tokens(40, batch=2)
    asked = {"attention_mask": torch.ones_like(text), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    asked["attention_mask"][1, :PADDING] = 0
    expected = model.generate(text, **asked)
    with apply(model, price_profile(model, warm_up=8), check=False) as applied:
        read.clear()
        assert model.generate(text, **asked).tolist() == expected.tolist()
        assert read == [(2, 40)]
        assert applied.stats.warm_up_tokens == 14
        model.generate(text, **asked, output_hidden_states=True, return_dict_in_generate=True)
        with torch.no_grad():
            model(text, past_key_values=DynamicCache())  # all logits
        assert len(read) == 1


@pytest.mark.parametrize("chunk", [None, 4, 16])
def test_generate_writes_the_same_behind_any_padding(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedEngine, "reads_prompts", lambda self, length: True)
    model, text = model_of(), pico_tokens(20, batch=2)
    mask = torch.ones_like(text)
    mask[0, :8] = 0
    mask[1, : 20 if chunk is None else 9] = 0  # a row of nothing else, and first chunks of nothing else
    asked = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "prefill_chunk_size": chunk}
    expected = model.generate(text, **asked).tolist()
    with accelerate(model):
        assert model.generate(text, **asked).tolist() == expected


def test_a_step_that_is_lost_as_a_prompt_begins_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedEngine, "reads_prompts", lambda self, length: True)
    model, text = model_of(), pico_tokens(20)
    with accelerate(model) as fused:
        model.generate(text, max_new_tokens=3)
        assert fused.path == "fused"
        model.half()
        model.generate(text, max_new_tokens=3)
        assert fused.path == "general"
        assert "float16" in str(fused.why_general)


@torch.no_grad()
def test_a_prompt_that_was_interrupted_can_be_followed_by_a_longer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedEngine, "reads_prompts", lambda self, length: True)
    model, longer, cache = pico_model(max_position_embeddings=2048), pico_tokens(700), DynamicCache()
    expected = model(longer, logits_to_keep=1).logits
    with accelerate(model):
        with monkeypatch.context() as patch:
            patch.setattr(CpuStep, "read", interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(pico_tokens(20), past_key_values=cache, logits_to_keep=1)
        found = model(longer, past_key_values=cache, logits_to_keep=1).logits
    assert torch.allclose(found, expected, atol=1e-4)


def interrupt(self: CpuStep, prompts: Tensor, starts: Tensor) -> Tensor:
    raise KeyboardInterrupt


@torch.no_grad()
def test_a_cache_that_is_filled_in_part_is_the_models_own() -> None:
    model = model_of()
    cache = DynamicCache(config=model.config)
    held = torch.randn(1, 2, 3, 8)
    cache.update(held, held, 0)
    with accelerate(model) as fused:
        model(pico_tokens(1), past_key_values=cache)
        assert "different numbers of tokens" in str(fused.why_general)


def test_a_prompt_can_be_traced() -> None:
    class Traced(torch.nn.Module):
        def __init__(self, model: PreTrainedModel) -> None:
            super().__init__()
            self.model = model

        def forward(self, text: Tensor) -> Any:
            return self.model(text, past_key_values=DynamicCache(), logits_to_keep=1).logits

    model, text = model_of(), pico_tokens(20)
    with torch.no_grad(), accelerate(model):
        traced = torch.jit.trace(Traced(model), (text,), check_trace=False)
        assert torch.allclose(traced(text), model(text, logits_to_keep=1).logits, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    step = FusedEngine(model_of(), None).step(1, 8)
    nothing = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(FfnskipError, match="of at most"):
        step.read(pico_tokens(step.cache.capacity + 1), nothing)
    with pytest.raises(FfnskipError, match="among the model's"):
        step.read(torch.tensor([[3, 10_000]]), nothing)
