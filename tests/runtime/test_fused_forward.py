"""A fused step behind the model's own forward: whatever calls the model gets the same tokens, counts and caches."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from support.compiler import needs_compiler
from support.generate import cosine, generate
from support.model_types import tiny_model
from support.on_disk import bytes_as_tokens
from support.pico import pico_model, pico_profile, pico_tokens
from support.price import price_profile
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import ffnskip
from ffnskip import Profile
from ffnskip.fast.families import FAMILIES
from ffnskip.fast.lent_cache import LentCache

pytestmark = needs_compiler
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 1]])
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 20},
    "padded": {"attention_mask": PADDED},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "processed": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "stopped": {"stop_strings": ["zz"], "tokenizer": bytes_as_tokens()},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "static": {"cache_implementation": "static"},
    "guided": {"guidance_scale": 1.5},
    "uncached": {"use_cache": False},
    "states": {"output_hidden_states": True, "return_dict_in_generate": True},
}
ONE_ROW = ("lookup", "guided")
OWN = ("lookup", "static", "uncached", "states")  # of which no pass over one token is for a step


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [cosine, price_profile])
def test_generate_writes_and_counts_as_without(family: str, make: Callable[[PreTrainedModel], Profile]) -> None:
    model, prompts = pico_model(family), pico_tokens(9, batch=3)
    profile = make(model)
    with ffnskip.apply(model, profile, path="general") as general:
        expected = generate(model, prompts, attention_mask=PADDED)
    with ffnskip.apply(model, profile, path="fused") as fused:
        assert generate(model, prompts, attention_mask=PADDED) == expected
    assert fused.path == "fused"
    assert fused.stats.skipped == general.stats.skipped
    assert fused.stats.skip_ratio == pytest.approx(general.stats.skip_ratio)
    assert fused.stats.skip_ratio > 0
    assert (fused.stats.tokens, fused.stats.warm_up_tokens) == (general.stats.tokens, general.stats.warm_up_tokens)
    assert fused.stats.least == pytest.approx(general.stats.least)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_way_to_generate_is_right(name: str) -> None:
    model, prompts = pico_model(), pico_tokens(9, batch=1 if name in ONE_ROW else 3)
    with ffnskip.apply(model, cosine(model), path="general") as general:
        expected = generate(model, prompts, **SETTINGS[name])
    with ffnskip.apply(model, cosine(model)) as fused:
        assert generate(model, prompts, **SETTINGS[name]) == expected
    assert fused.stats.skipped == general.stats.skipped
    assert fused.stats.tokens == general.stats.tokens
    if name not in OWN:
        assert fused.path == "fused"
    elif name in ("static", "states"):
        assert fused.why_general


@pytest.mark.parametrize("name", ["gemma3", "llava", "mistral3"])
def test_models_that_see_pictures_reach_their_text_side(name: str) -> None:
    model, prompts = tiny_model(f"{name} (vision)"), torch.arange(9)[None] + 20
    profile = pico_profile(model, threshold=-1.0, warm_up=3, cold_e=3)
    with ffnskip.apply(model, profile, path="general") as general:
        expected = generate(model, prompts)
    with ffnskip.apply(model, profile, path="fused") as fused:
        assert generate(model, prompts) == expected
    assert fused.path == "fused", fused.why_general
    assert fused.stats.skipped == general.stats.skipped


def test_turns_of_a_conversation_share_a_cache() -> None:
    model = pico_model()

    def talk() -> list[list[int]]:
        cache, text, said = DynamicCache(), pico_tokens(7), []
        for turn in range(3):
            text = torch.cat([text, pico_tokens(3, seed=turn)], dim=1)
            text = torch.tensor(generate(model, text, max_new_tokens=9, past_key_values=cache))
            said += text.tolist()
        assert cache.get_seq_length() == text.shape[1] - 1
        return said

    with ffnskip.apply(model, cosine(model), path="general") as general:
        expected = talk()
    with ffnskip.apply(model, cosine(model)) as fused:
        assert talk() == expected
    assert fused.stats == general.stats
    assert fused.path == "fused"


@torch.no_grad()
def test_two_conversations_go_on_in_turns() -> None:
    model = pico_model()
    prompts = [pico_tokens(7, seed=1), pico_tokens(5, seed=2)]

    def talk() -> list[Tensor]:
        caches, logits = [DynamicCache() for _ in prompts], []
        for cache, prompt in zip(caches, prompts, strict=True):
            model(prompt, past_key_values=cache)
        for _ in range(12):
            for index, cache in enumerate(caches):
                latest = logits[-2].argmax(-1) if len(logits) > 1 else torch.tensor([[index]])
                logits.append(model(latest, past_key_values=cache).logits)
        return logits

    with ffnskip.apply(model, cosine(model), path="general") as general:
        expected = talk()
    with ffnskip.apply(model, cosine(model)) as fused:
        torch.testing.assert_close(talk(), expected, rtol=1e-4, atol=1e-4)
    assert fused.stats == general.stats


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_cache_is_an_ordinary_one_as_soon_as_it_is_looked_at(family: str) -> None:
    model, prompt = pico_model(family), pico_tokens(12)

    def cache_of(steps: int) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(prompt, past_key_values=cache)
        for token in range(steps):
            model(torch.tensor([[token]]), past_key_values=cache)
        return cache

    expected = cache_of(9)
    with ffnskip.accelerate(model):
        cache = cache_of(9)
        assert type(cache) is LentCache
        assert cache.get_seq_length() == 21
        copy = deepcopy(cache)
        model(torch.tensor([[5]]), past_key_values=cache)
        model(torch.tensor([[5, 6]]), past_key_values=copy)
    assert type(copy) is DynamicCache
    for layer, known in zip(copy.layers, expected.layers, strict=True):
        kept = known.keys.shape[2] - 2 if family == "mistral" else 21
        torch.testing.assert_close(layer.keys[:, :, :kept], known.keys[:, :, -kept:], rtol=1e-4, atol=1e-4)
    assert copy.get_seq_length() == 23
