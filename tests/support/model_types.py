"""A tiny random model of each decoder-only type that transformers knows, built in-process."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 256
# Encoders and encoder-decoders that the mapping of causal language models lists too.
_NO_DECODERS = [
    *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert"),
    *("data2vec-text", "electra", "ernie", "git", "marian", "mbart", "megatron-bert", "moshi", "musicgen"),
    *("musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "reformer", "rembert", "roberta"),
    *("roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl"),
    *("xlnet", "xmod"),
]
TYPES = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in _NO_DECODERS]
# Speculators of another model; one that cannot be made small, and one that needs a package for pictures.
UNBUILT = ("blt", "dots3_note", "gemma3n", "gemma4_assistant", "gemma4_unified_assistant")
# Classes that take pictures too, of which the side that takes text is tried; by the name of the type and a mark.
VISION = [
    f"{name} (vision)"
    for name in ("gemma3", "glm4v", "llama4", "llava", "mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
]

# What a size of a configuration becomes, if it is larger.
_SIZES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions n_ctx model_max_length context_length",
    96: "intermediate_size ffn_dim dff dim_ff intermediate_size_mlp ffn_hidden_size dense_intermediate_size",
    64: "hidden_size d_model n_embd dim_model lru_width word_embed_proj_dim attention_hidden_size",
    32: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_intermediate_size "
    "expert_ffn_hidden_size",
    16: "head_dim kv_lora_rank q_lora_rank v_head_dim sliding_window global_head_dim o_lora_rank attention_head_dim "
    "dim_head router_hidden_size linear_key_head_dim linear_value_head_dim linear_head_dim lightning_head_dim "
    "index_topk attention_window_size attention_chunk_size mamba_d_state mamba_d_head mamba_head_dim ssm_state_size "
    "hidden_size_per_layer_input swa_head_dim",
    8: "qk_rope_head_dim qk_nope_head_dim index_head_dim mamba_chunk_size chunk_size rotary_dim laurel_rank "
    "adapter_rank",
    4: "num_hidden_layers n_layer n_layers num_layers num_blocks num_attention_heads n_head n_heads attention_heads "
    "num_heads linear_num_heads linear_num_value_heads num_experts num_local_experts n_routed_experts moe_num_experts "
    "mamba_num_heads mamba_n_heads num_lightning_heads",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk moe_k index_n_heads "
    "num_global_key_value_heads linear_num_key_heads mamba_d_conv linear_conv_kernel_dim",
    1: "n_group topk_group num_shared_experts n_shared_experts mamba_n_groups mamba_ngroups n_groups num_expert_group "
    "num_nextn_predict_layers mamba_expand",
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LATENT = {
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    **{"head_dim": 8, "num_key_value_heads": 4, "num_experts_per_tok": 2},
}
_LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention"] * 2
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_ROTARY_3D = {"rope_parameters": _ROTARY | {"mrope_section": [2, 3, 3]}}
_QWEN4 = {
    **{"indexer_budget": 8, "indexer_compress_ratio": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1},
    "indexer_head_dim": 16,
}
_DOTS3 = {
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16},
    **{"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_qk_rope_head_dim": 8, "swa_v_head_dim": 16},
    **_LATENT,
    **{"num_attention_heads": 4, "head_dim": 16},
}
# What sizes alone do not say; None leaves a size out.
_SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT | {"index_head_dim": 16},
    "bailing_hybrid": _LATENT | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": _LOCAL_AND_GLOBAL,
        "rope_parameters": {"sliding_attention": _ROTARY, "full_attention": _ROTARY},
    },
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2}},
    "deepseek_v2": _LATENT | {"topk_method": "greedy"},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT | {"index_head_dim": 16},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": _DOTS3,
    "falcon": {"head_dim": None},
    "gemma3n_text": {
        **{"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [96] * 4},
        "layer_types": _LOCAL_AND_GLOBAL,
    },
    "glm4v_text": _ROTARY_3D,
    "glm_moe_dsa": _LATENT | {"index_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        "mamba_dt_rank": 4,
    },
    "kimi_linear": _LATENT | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": _LATENT | {"num_layers": 4, "moe_topk": 2, "zero_expert_num": 2, "num_hidden_layers": None},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "state_size": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "xlstm": {"v_head_dim": None, "qk_head_dim": None},
    "youtu": _LATENT,
    "zamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "attention_head_dim": 32},
        **{"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128},
    },
    "zamba2": {
        **{"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128},
        **{"attention_head_dim": 32},
    },
    "qwen2_5_vl_text": _ROTARY_3D,
    "qwen3_vl_text": _ROTARY_3D,
    "qwen4_exp_text": _QWEN4,
}


def tiny_config(name: str) -> PreTrainedConfig:
    """The default configuration of a type, with all sizes made small."""
    sizes = _small(AutoConfig.for_model(name)) | _TOKENS
    if "text_config" in sizes:
        sizes["text_config"] |= _TOKENS | _SPECIAL.get(f"{name}_text", {})
    sizes |= _SPECIAL.get(name, {})
    config = AutoConfig.for_model(name, **{key: value for key, value in sizes.items() if value is not None})
    if name == "dbrx":
        config.attn_config.rope_theta = 10000.0  # which its modelling code asks for, and its configuration has lost
    return config


def tiny_model(name: str) -> PreTrainedModel:
    """In eval mode and float32, with random weights that keep the size of what passes through."""
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if name in VISION else AutoModelForCausalLM
    model = auto.from_config(tiny_config(name.removesuffix(" (vision)")), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def _small(config: PreTrainedConfig) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for name in dir(config):
        if name not in _SMALL and not name.endswith("_config"):
            continue
        try:
            value = getattr(config, name)
        except (AttributeError, RuntimeError):  # not set, or one for each layer
            continue
        if isinstance(value, PreTrainedConfig):
            sizes[name] = _small(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > _SMALL.get(name, value):
            sizes[name] = _SMALL[name]
    return sizes
