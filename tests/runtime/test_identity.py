"""The hash that ties a profile to an architecture."""

from typing import Any

import pytest
import torch
from support.pico import SIZES, pico_model
from transformers import AutoConfig, PreTrainedConfig

from ffnskip.profiles.identity import config_sha256, model_info


def config(**changes: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(changes.pop("model_type", "llama"), **{**SIZES, "rms_norm_eps": 1e-5, **changes})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("transformers_version", "4.40.0"), ("dtype", torch.float16), ("name_or_path", "org/other")),
        *(("_attn_implementation", "eager"), ("use_cache", False), ("architectures", ["LlamaForCausalLM"])),
        ("eos_token_id", 7),
    ],
)
def test_the_hash_ignores_what_depends_on_the_container(field: str, value: object) -> None:
    other = config()
    setattr(other, field, value)
    assert getattr(other, field) != getattr(config(), field)
    assert config_sha256(other) == config_sha256(config())


def test_a_float_as_gguf_stores_it_has_the_same_hash() -> None:
    stored = float(torch.tensor(1e-5, dtype=torch.float32))
    assert stored != 1e-5
    assert config_sha256(config(rms_norm_eps=stored)) == config_sha256(config())


def test_the_hash_survives_a_round_trip_through_a_file(tmp_path: Any) -> None:
    config().save_pretrained(tmp_path)
    assert config_sha256(AutoConfig.from_pretrained(tmp_path)) == config_sha256(config())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("model_type", "mistral"), ("vocab_size", 102), ("hidden_size", 64), ("intermediate_size", 49)),
        *(("num_hidden_layers", 7), ("num_attention_heads", 2), ("num_key_value_heads", 4), ("hidden_act", "gelu")),
        *(("rms_norm_eps", 1e-6), ("tie_word_embeddings", True), ("head_dim", 16), ("num_experts", 8)),
        *(("moe_intermediate_size", 8), ("n_inner", 8)),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
    ],
)
def test_the_hash_differs_with_the_architecture(field: str, value: object) -> None:
    assert config_sha256(config(**{field: value})) != config_sha256(config())


@pytest.mark.parametrize(
    ("model_type", "field", "value"),
    [("mixtral", "num_local_experts", 9), ("mixtral", "num_experts_per_tok", 1), ("phi", "layer_norm_eps", 1e-6)],
)
def test_the_hash_differs_with_what_some_architectures_have(model_type: str, field: str, value: object) -> None:
    other = config(model_type=model_type, **{field: value})
    assert config_sha256(other) != config_sha256(config(model_type=model_type))


def test_model_info_is_read_from_the_model() -> None:
    model = pico_model("qwen3")
    info = model_info(model, id="org/pico", revision="0" * 40)
    assert (info.id, info.revision, info.gguf_sha256) == ("org/pico", "0" * 40, None)
    assert (info.model_type, info.n_layers, info.hidden_size) == ("qwen3", 6, 32)
    assert info.config_sha256 == config_sha256(model.config)
