"""Pico models as GGUF files, as llama.cpp lays them out, in whatever types of blocks."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Blocks = NDArray[np.uint8]
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
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
    config, architecture = model.config, architecture or model.config.model_type
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
    writer.add_tokenizer_model("gpt2")
    rest = range(1, config.vocab_size)
    names = tokenizer.convert_ids_to_tokens(list(rest)) if tokenizer else [f"t{token}" for token in rest]
    writer.add_token_list(
        ["ab", *names]
    )  # the format has no tokenizer without merges: it takes the first token's place
    writer.add_token_merges(["a b"])
    if tokenizer:
        writer.add_bos_token_id(tokenizer.bos_token_id)
        writer.add_eos_token_id(tokenizer.eos_token_id)
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
        values = tensor.float().numpy()
        data = values if tensor.dim() == 1 else blocks(values, as_kind)
        writer.add_tensor(stored, data, raw_dtype=as_kind)
