"""What becomes of the fused step behind a model's forward when the model changes, is copied, or is asked for more."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from errno import ENOMEM

import pytest
import torch
from support.compiler import needs_compiler
from support.generate import cosine, generate
from support.pico import pico_model, pico_profile, pico_tokens
from transformers import DynamicCache

import ffnskip
from ffnskip import FfnskipError, UnsupportedModelError
from ffnskip.general.wrap import Applied

pytestmark = needs_compiler


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


def test_where_memory_has_no_room_for_a_cache_the_model_runs_its_own_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(ENOMEM, "Cannot allocate memory")

    model, prompts = pico_model(), pico_tokens(9)
    expected = generate(model, prompts)
    with ffnskip.accelerate(model) as fused:
        monkeypatch.setattr("ffnskip.pages.mmap.mmap", refuse)
        assert generate(model, prompts) == expected
        assert "no room" in str(fused.why_general)


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
