"""A fused step behind the model's own forward: whatever calls the model gets the same tokens, counts and caches."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch
from support.compiler import needs_compiler
from support.model_types import tiny_model
from support.on_disk import bytes_as_tokens
from support.pico import pico_model, pico_profile, pico_tokens
from support.price import price_profile
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import ffnskip
from ffnskip import FfnskipError, Profile, UnsupportedModelError
from ffnskip.fast.lent_cache import LentCache
from ffnskip.general.wrap import Applied

pytestmark = needs_compiler
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
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


def cosine(model: PreTrainedModel) -> Profile:
    return pico_profile(model, threshold=0.9, warm_up=3)


def generate(model: PreTrainedModel, prompts: Tensor, **settings: Any) -> list[list[int]]:
    torch.manual_seed(0)
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | settings
    output = model.generate(prompts, **settings)
    return (output if isinstance(output, Tensor) else output.sequences).tolist()


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


def test_the_model_is_its_own_again() -> None:
    model, prompts = pico_model(), pico_tokens(9, batch=2)
    expected, before = generate(model, prompts), {name: vars(m).keys() for name, m in model.named_modules()}
    with ffnskip.accelerate(model) as fused:
        with pytest.raises(FfnskipError, match="accelerated"):
            ffnskip.apply(model, cosine(model))
        copy = deepcopy(model)
        assert generate(model, prompts) == expected
        assert fused.path == "fused"
    assert generate(model, prompts) == generate(copy, prompts) == expected
    assert {name: vars(m).keys() for name, m in model.named_modules()} == before


def test_gradients_are_the_models_own() -> None:
    model, cache = pico_model(), DynamicCache()
    with ffnskip.accelerate(model):
        model(pico_tokens(5), past_key_values=cache)
        model(torch.tensor([[3]]), past_key_values=cache).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_weights_that_change_are_read_anew_and_a_hook_is_run() -> None:
    model, prompts = pico_model(), pico_tokens(9)
    seen = []
    with ffnskip.accelerate(model) as fused:
        generate(model, prompts)
        with torch.no_grad():
            model.model.layers[2].mlp.down_proj.weight.mul_(-1.0)
        changed = generate(model, prompts)
        assert fused.path == "fused"
        hook = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
        assert generate(model, prompts) == changed
        assert len(seen) == 24
        assert "hook" in str(fused.why_general)
        hook.remove()
        assert generate(model, prompts) == changed
        assert fused.path == "fused"
    assert generate(model, prompts) == changed


def test_a_cache_grows_and_ends_where_the_model_does() -> None:
    model, prompts = pico_model(max_position_embeddings=600), pico_tokens(9)
    expected = generate(model, prompts, max_new_tokens=580)
    with ffnskip.accelerate(model) as fused:
        assert generate(model, prompts, max_new_tokens=580) == expected
        assert fused.path == "fused"


def test_a_model_without_a_step_says_so() -> None:
    model = pico_model("starcoder2")
    with pytest.raises(UnsupportedModelError, match="have no fused decode step"):
        ffnskip.accelerate(model)
    with ffnskip.apply(model, cosine(model)) as applied:
        assert "have no fused decode step" in str(applied.why_general)
        generate(model, pico_tokens(5))


def test_in_score_mode_nothing_is_fused() -> None:
    model = pico_model()
    with ffnskip.apply(model, cosine(model), mode="score") as applied:
        model(pico_tokens(20))
    assert applied.path == "general"
    assert isinstance(applied, Applied)


@torch.no_grad()
def test_a_profile_asleep_or_in_score_mode_is_the_models_own_pass() -> None:
    model, prompt = pico_model(), pico_tokens(12)
    for setting in ({"asleep": True}, {"mode": "score"}):
        found = []
        for path in ("general", "fused"):
            with ffnskip.apply(model, pico_profile(model, threshold=-1.0), path=path) as applied:  # type: ignore[arg-type]
                for name, value in setting.items():
                    setattr(applied, name, value)
                cache = DynamicCache()
                logits = [model(prompt, past_key_values=cache).logits[:, -1]]
                logits += [model(torch.tensor([[token]]), past_key_values=cache).logits[:, -1] for token in range(9)]
                found.append((torch.stack(logits), applied.stats))
        torch.testing.assert_close(found[1][0], found[0][0])
        assert found[1][1] == found[0][1]


@torch.no_grad()
@pytest.mark.parametrize("change", ["hook", "weights"])
def test_a_change_within_a_sequence_is_noticed(change: str) -> None:
    model, prompt = pico_model(), pico_tokens(12)
    with ffnskip.accelerate(model) as fused:
        cache, ordinary = DynamicCache(), DynamicCache()
        for each in (cache, ordinary):
            model(prompt, past_key_values=each)
        model(torch.tensor([[5]]), past_key_values=cache)
        assert fused.path == "fused"
        if change == "hook":
            model.model.layers[1].register_forward_hook(lambda module, args, output: output * 2)
        else:
            model.model.norm.weight.mul_(-2.0)
        found = model(torch.tensor([[6]]), past_key_values=cache).logits
        assert fused.path == ("general" if change == "hook" else "fused")
    model(torch.tensor([[5]]), past_key_values=ordinary)
    expected = model(torch.tensor([[6]]), past_key_values=ordinary).logits
    if change == "weights":  # the last norm's, which no key or value depends on
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_odd_passes_are_the_models_own_and_said_to_be() -> None:
    model = pico_model("gemma2")
    with ffnskip.accelerate(model) as fused, torch.no_grad():
        cache = DynamicCache()
        model(pico_tokens(5), past_key_values=cache)
        with pytest.raises(IndexError):
            model(torch.tensor([[10**9]]), past_key_values=cache)
        assert "token that the model does not have" in str(fused.why_general)
        model.train()
        model(torch.tensor([[3]]), past_key_values=cache)
        assert "training" in str(fused.why_general)
        model.eval()
        with torch.enable_grad():
            model(torch.tensor([[3]]), past_key_values=cache)
        assert "no_grad" in str(fused.why_general)
        embedded = model.get_input_embeddings()(torch.tensor([[3]]))
        model(inputs_embeds=embedded, past_key_values=cache)
        assert "embeddings" in str(fused.why_general)
        model(torch.tensor([[3]]), past_key_values=cache)
        assert fused.path == "fused"


def test_a_copy_of_a_model_with_a_profile_on_can_be_freed_of_it() -> None:
    model, prompts = pico_model(), pico_tokens(9)
    dense = generate(model, prompts)
    applied = ffnskip.apply(model, cosine(model))
    copied, its = deepcopy((model, applied))
    assert its.path == "general"
    assert generate(copied, prompts) == generate(model, prompts) != dense
    its.remove()
    assert generate(copied, prompts) == dense
    applied.remove()


def test_threads_decode_while_weights_change() -> None:
    model, prompts = pico_model(), pico_tokens(9)
    expected = generate(model, prompts)
    with ffnskip.accelerate(model), ThreadPoolExecutor(3) as pool:
        runs = []
        for _ in range(12):
            runs.append(pool.submit(generate, model, prompts))
            with torch.no_grad():
                model.model.norm.weight.mul_(1.0)
        assert all(run.result() == expected for run in runs)
