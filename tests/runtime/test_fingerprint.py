"""The fingerprint by which a profile knows the weights that it was made on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.factories import make_compensated
from support.pico import SUPPORTED, pico_model, pico_profile
from torch import nn
from transformers import PreTrainedModel

import ffnskip
from ffnskip.errors import FfnskipWarning, ProfileError
from ffnskip.profiles.fingerprint import weights_sha256
from ffnskip.profiles.identity import model_info
from ffnskip.profiles.weights import Weights

pytestmark = pytest.mark.filterwarnings("ignore:The profile did nothing")
ORIGINAL = weights_sha256(pico_model())


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_it_is_the_same_in_whatever_precision_the_model_is_loaded(name: str, stored: torch.dtype) -> None:
    model = pico_model(name, stored)
    found = weights_sha256(model)
    wider = (torch.float32, torch.float64) if stored == torch.float32 else (torch.float32, torch.float16)
    for dtype in (*wider, torch.bfloat16):
        assert weights_sha256(pico_model(name, stored).to(dtype)) == found
    assert weights_sha256(model) == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_packed_model_has_that_of_the_weights_it_was_packed_from(format: Any, dtype: torch.dtype) -> None:
    model = pico_model(dtype=dtype, intermediate_size=64)
    before = weights_sha256(model)
    ffnskip.pack_weights(model, format)
    assert weights_sha256(model) == before


def test_it_does_not_depend_on_how_the_weights_lie_in_memory() -> None:
    model = pico_model()
    for layer in model.model.layers:
        weight = layer.mlp.gate_proj.weight
        weight.data = weight.data.T.contiguous().T
    assert weights_sha256(model) == ORIGINAL


@torch.no_grad()
def permute(model: PreTrainedModel) -> None:
    """Of one layer, two neurons change places: the function is the same."""
    ffn, order = model.model.layers[3].mlp, torch.arange(48)
    order[[7, 31]] = order[[31, 7]]
    for matrix in (ffn.gate_proj, ffn.up_proj):
        matrix.weight.copy_(matrix.weight[order])
    ffn.down_proj.weight.copy_(ffn.down_proj.weight[:, order])


@torch.no_grad()
def train(model: PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        if name.endswith("q_proj.weight"):
            weight += 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))


def change_norm(model: PreTrainedModel) -> None:
    model.model.norm.weight.data[5] *= 1.01


def change_head(model: PreTrainedModel) -> None:
    model.lm_head.weight.data.mul_(1.01)


CHANGES = [permute, train, change_norm, change_head]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_weights_have_another(change: Callable[[PreTrainedModel], None], dtype: torch.dtype) -> None:
    model = pico_model(dtype=dtype)
    change(model)
    assert weights_sha256(model) != ORIGINAL


ROPE = {"rope_type": "default", "rope_theta": 1e4}
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LOCAL = {"sliding_attention": ROPE, "full_attention": {**ROPE, "rope_theta": 1e6}}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"rope_parameters": {**ROPE, "rope_theta": 5e5}}),
        ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}}),
        ("llama", {"rope_parameters": {**ROPE, **LLAMA_3, "rope_type": "llama3"}}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("mistral", {"sliding_window": 9}),
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"attn_logit_softcapping": 20.0}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gemma2", {"layer_types": ["full_attention"] * 6}),
        ("gemma3_text", {"rope_parameters": {**LOCAL, "full_attention": {**ROPE, "rope_theta": 2e6}}}),
        ("granite", {"residual_multiplier": 0.3}),
        ("phi", {"partial_rotary_factor": 0.25}),
        ("gpt_neox-parallel", {"use_parallel_residual": False}),
    ],
    ids=str,
)
def test_another_configuration_of_the_same_shapes_has_another(name: str, change: dict[str, Any]) -> None:
    assert weights_sha256(pico_model(name, **change)) != weights_sha256(pico_model(name))


@pytest.mark.parametrize("change", [{"initializer_range": 0.5}, {"eos_token_id": 7}, {"use_cache": False}])
def test_what_changes_nothing_that_the_network_computes_does_not_count(change: dict[str, Any]) -> None:
    assert weights_sha256(pico_model(**change)) == ORIGINAL


class LoRA(nn.Module):
    """A linear layer with an adapter, as PEFT names its parts; the second factor starts as zeros."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)
        self.disable_adapters = False


def test_an_adapter_counts_as_other_weights_unless_it_is_zero_or_off() -> None:
    model = pico_model()
    attention = model.model.layers[2].self_attn
    attention.q_proj = adapted = LoRA(attention.q_proj)
    assert weights_sha256(model) == ORIGINAL
    adapted.lora_B["default"].weight.data[0, 0] = 0.5
    assert weights_sha256(model) != ORIGINAL
    adapted.disable_adapters = True
    assert weights_sha256(model) == ORIGINAL


def fitted(model: PreTrainedModel, **overrides: Any) -> ffnskip.Profile:
    """A profile with weights of its own."""
    own = model_info(model, id="org/pico").model_dump()
    return make_compensated("low-rank", rule="predicted-damage", rank=3, neurons=4, **own, threshold=1.0, **overrides)


def test_what_was_fitted_to_other_weights_is_refused_unless_the_caller_knows() -> None:
    model, profile = pico_model(), fitted(pico_model())
    ffnskip.apply(model, profile).remove()
    permute(model)
    for use in (ffnskip.apply, ffnskip.Decoder):
        with pytest.raises(ProfileError, match=r"^The profile was made on other weights: model.weights_sha256 is "):
            use(model, profile)
    ffnskip.apply(model, profile, other_weights=True).remove()
    assert ffnskip.Decoder(model, profile, other_weights=True).profile == profile


def test_a_rule_without_weights_goes_on_with_other_weights_and_says_so() -> None:
    model, profile = pico_model(), pico_profile(pico_model())
    train(model)
    with pytest.warns(FfnskipWarning, match=r"^The profile was made on other weights: .* not what it says\.$"):
        ffnskip.apply(model, profile).remove()


@pytest.mark.parametrize("make", [fitted, pico_profile])
def test_a_profile_without_a_fingerprint_is_taken_with_a_warning(make: Callable[..., ffnskip.Profile]) -> None:
    model = pico_model()
    old = make(model)
    old = old.model_copy(update={"model": old.model.model_copy(update={"weights_sha256": None})})
    with pytest.warns(FfnskipWarning, match=r"^The profile does not say which weights it was made on"):
        ffnskip.apply(model, old).remove()


def test_weights_that_the_models_precision_cannot_hold_are_refused() -> None:
    profile = fitted(pico_model())
    bias = profile.weights.tensors["bias"] * 0 + 7e4
    profile = profile.with_weights(Weights({**profile.weights.tensors, "bias": bias}))
    ffnskip.apply(pico_model(), profile).remove()
    with pytest.raises(ProfileError, match=r"^The weights: bias: holds numbers too large for float16: "):
        ffnskip.apply(pico_model().half(), profile, other_weights=True)


def test_what_a_quantized_matrix_keeps_in_buffers_counts() -> None:
    model = pico_model()
    ffn = model.model.layers[1].mlp
    matrix = torch.nn.Module()
    matrix.register_buffer("qweight", torch.arange(96, dtype=torch.int32).reshape(12, 8))
    ffn.down_proj = matrix
    before = weights_sha256(model)
    assert weights_sha256(model) == before
    matrix.qweight.copy_(matrix.qweight.flip(0))
    assert weights_sha256(model) != before
