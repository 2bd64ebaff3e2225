"""LoRA under a profile: trained, saved, loaded and merged as without one, and skipping all the same."""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.factories import make_compensated
from support.pico import entering_and_leaving, middle_threshold, pico_model, pico_profile, pico_tokens
from torch import Tensor
from transformers import PreTrainedModel

import ffnskip
from ffnskip.model.sites import ffn_sites

TEXT = pico_tokens(12, batch=2)
TARGETS = ["q_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = ["llama", "gemma2"]


def with_lora(model: PreTrainedModel) -> peft.PeftModel:
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=TARGETS, lora_dropout=0.0)).eval()


def train(model: peft.PeftModel) -> None:
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(TEXT, labels=TEXT).loss.backward()
        optimizer.step()


def trained(name: str) -> peft.PeftModel:
    model = with_lora(pico_model(name))
    train(model)
    return model


@torch.inference_mode()
def logits(model: object) -> Tensor:
    result: Tensor = model(TEXT).logits  # type: ignore[operator]
    return result


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_trained_and_saved_under_a_profile_as_without_one(name: str, tmp_path: Path) -> None:
    trained(name).save_pretrained(tmp_path / "without")
    base = pico_model(name)
    with ffnskip.apply(base, pico_profile(base, threshold=2.0, warm_up=0), mode="score"):
        model = with_lora(base)
        train(model)
        model.save_pretrained(tmp_path / "with")
    expected, saved = (load_file(tmp_path / part / "adapter_model.safetensors") for part in ("without", "with"))
    assert len(saved) == 2 * len(TARGETS) * base.config.num_hidden_layers
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_loaded_under_a_profile_counts(name: str, tmp_path: Path) -> None:
    model = trained(name)
    model.save_pretrained(tmp_path)
    expected, base = logits(model), pico_model(name)
    assert not torch.equal(expected, logits(base))
    with ffnskip.apply(base, pico_profile(base, threshold=2.0, warm_up=0), mode="score"):
        base.load_adapter(tmp_path)
        assert torch.equal(logits(base), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_merged_under_a_profile_is_the_merged_model_and_skips_as_it_does(name: str) -> None:
    merged = trained(name).merge_and_unload()
    threshold = middle_threshold(merged, TEXT)
    profile = pico_profile(merged, threshold=threshold, warm_up=0)
    with ffnskip.apply(merged, profile, mode="score") as applied:
        expected, stats = logits(merged), applied.stats
    assert 0 < stats.skip_ratio < 0.6
    model = trained(name)
    with ffnskip.apply(model.base_model.model, profile, mode="score", other_weights=True) as applied:
        again = model.merge_and_unload()
        assert torch.equal(logits(again), expected)
        assert applied.stats == stats
        names = again.state_dict().keys()
    assert names == pico_model(name).state_dict().keys()
    assert torch.equal(logits(again), logits(merged))


def test_what_is_added_for_a_skipped_ffn_is_all_that_an_adapters_layer_adds() -> None:
    model = trained("llama").base_model.model
    profile = pico_profile(model, cold_s=2, cold_e=4, threshold=-1.0, warm_up=0)
    with ffnskip.apply(model, profile, mode="score", other_weights=True):
        layer = ffn_sites(model)[3].layer
        entered, left = entering_and_leaving(model, layer, TEXT)
    silence = layer.mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    hook = layer.register_forward_pre_hook(lambda module, args: (entered, *args[1:]))
    _, expected = entering_and_leaving(model, layer, TEXT)
    silence.remove()
    hook.remove()
    assert torch.equal(left, expected)


def test_neurons_that_an_adapter_has_changed_are_refused() -> None:
    base = pico_model()
    profile = make_compensated(
        "low-rank", rank=3, neurons=4, **pico_profile(base, threshold=-1.0, warm_up=0).model.model_dump()
    )
    profile = profile.model_copy(update={"skip": pico_profile(base, threshold=-1.0, warm_up=0).skip})
    with ffnskip.apply(base, profile.with_weights(profile.weights), mode="score"):
        logits(base)
        with_lora(base)
        with pytest.raises(ffnskip.ProfileError, match="without adapters"):
            logits(base)
