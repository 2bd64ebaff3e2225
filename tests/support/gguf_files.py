"""Pico models as GGUF files, as llama.cpp lays them out, in whatever types of blocks."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Blocks = NDArray[np.uint8]
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}


def blocks(values: NDArray[np.float32], kind: Kind) -> Blocks:
    """Numbers ``[rows, columns]`` in blocks; of Q4_K and Q6_K, which the library cannot make, any blocks."""
    if kind not in (Kind.Q4_K, Kind.Q6_K):
        return np.ascontiguousarray(gguf.quants.quantize(values, kind)).view(np.uint8)
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (*values.shape[:-1], values.shape[-1] // size)
    random = np.random.default_rng(values.size)
    made = random.integers(0, 256, (*shape, nbytes), dtype=np.uint8)
    units = random.uniform(1e-4, 2e-4, (*shape, 2)).astype(np.float16).view(np.uint8)
    if kind == Kind.Q4_K:
        made[..., :4] = units  # of factors and of offsets
    else:
        made[..., -2:] = units[..., :2]
    return made.reshape(*values.shape[:-1], -1)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: Callable[[str], Kind],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    architecture: str | None = None,
) -> Path:
    """A model as a file.

    Args:
        path: the file.
        model: of one of a few types.
        kind: gives the type of a matrix by its name in the file; what is no matrix is in float32.
        tokenizer: of bytes; without one the file has a vocabulary of names that mean nothing.
        architecture: what the file says that it is, in place of the model's type.
    """
    config = model.config
    architecture = architecture or gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[config.model_type]]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if (head_dim := getattr(config, "head_dim", None)) is not None:
        writer.add_key_length(head_dim)
    if getattr(config, "sliding_window", None) is not None:
        writer.add_sliding_window(config.sliding_window)
    rotation = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rotation["rope_theta"])
    if rotation["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rotation["factor"])
    writer.add_tokenizer_model("gpt2")
    rest = range(1, config.vocab_size)
    names = tokenizer.convert_ids_to_tokens(list(rest)) if tokenizer else [f"t{token}" for token in rest]
    writer.add_token_list(
        ["ab", *names]
    )  # the format has no tokenizer without merges: it takes the first token's place
    writer.add_token_merges(["a b"])
    special = tokenizer or config
    writer.add_bos_token_id(special.bos_token_id)
    writer.add_eos_token_id(special.eos_token_id)
    if special.pad_token_id is not None:
        writer.add_pad_token_id(special.pad_token_id)
    _add_tensors(writer, model, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensors(writer: gguf.GGUFWriter, model: PreTrainedModel, kind: Callable[[str], Kind]) -> None:
    names = gguf.get_tensor_name_map(_ARCHITECTURES[model.config.model_type], model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stored = names.get_name(name, (".weight", ".bias"))
        as_kind = kind(stored) if tensor.dim() > 1 else Kind.F32
        values = _as_llama_cpp_has_it(stored, tensor.float(), model.config).numpy()
        data = values if tensor.dim() == 1 else blocks(values, as_kind)
        writer.add_tensor(stored, data, raw_dtype=as_kind)


def _as_llama_cpp_has_it(stored: str, values: Tensor, config: PretrainedConfig) -> Tensor:
    """Gemma's norms with the 1 that the model adds; Llama's queries and keys in the order of its own rotation."""
    if config.model_type.startswith("gemma") and stored.endswith("norm.weight"):
        return values + 1
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(stored.split(".")[-2])
    if config.model_type == "llama" and heads:
        return values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
    return values
