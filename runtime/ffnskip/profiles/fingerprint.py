"""A fingerprint of a model's weights, cheap enough to take whenever a profile is put on.

Two models of one architecture may hold other weights, and then what was fitted to the one is noise on the other. So a
profile carries a hash over a sample of every weight, and over what the weights are used with and their shapes do not
show: rotary embedding, attention windows, caps, scales.

The sample has a value of every row and every column of a matrix, at places that its shape alone fixes: permuted neurons
move rows, a fine-tune moves nearly all. Values are rounded to bfloat16 first, and those too small for float16's normal
range count as zero. So a model has the same fingerprint loaded in float32 and in bfloat16, whichever it is stored in,
and in float16 too if it is stored in 16 bits. (Weights stored in 32 bits are rounded twice on the way through float16:
those loaded so count as others.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ffnskip.model.sites import decoder_body

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_MOST = 2**15  # values of one weight; as many as the widest models have neurons
_STEP = 7919  # a prime, so that columns are visited in an order of their own and none twice
_SMALLEST = 2.0**-14  # float16 keeps less than 8 bits of what is smaller
_PACKED = "_ffnskip_weights_sha256"  # of a packed model: what its weights had

# What makes another network of weights of the same names and shapes, by the names of transformers. What is absent, None
# or False is left out, as other versions of transformers may not know it.
_SETTINGS = (
    *("rope_parameters", "rope_local_base_freq", "no_rope_layers", "alibi"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "attention_chunk_size"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "clip_qkv"),
    *("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"),
    *("attn_temperature_tuning", "floor_scale", "attn_scale", "scale_attn_by_inverse_layer_idx"),
    *("use_parallel_residual", "parallel_attn", "swiglu_limit"),
    *("norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "topk_method", "scoring_func"),
)
_QUANTIZED = ("qweight", "qzeros", "scales", "weight_packed", "weight_scale")  # buffers of GPTQ, AWQ and their like


LookUp = Callable[[Tensor, Tensor, Tensor], Tensor]


def _in_memory(weight: Tensor, row: Tensor, column: Tensor) -> Tensor:
    matrix = weight.reshape(-1, weight.shape[-1]) if weight.dim() else weight.reshape(1, 1)
    return matrix[row.to(weight.device), column.to(weight.device)]


@torch.no_grad()
def weights_sha256(model: PreTrainedModel, look_up: LookUp = _in_memory) -> str:
    """The fingerprint, 64 hex digits.

    A packed model has that of the weights it was packed from. Adapters of PEFT that are on and not zero are part of it.

    Args:
        model: the model.
        look_up: given a weight, rows ``[n]`` and columns ``[n]``, the values there; for weights that are not in memory.
    """
    if (packed := getattr(model, _PACKED, None)) is not None:
        return str(packed)
    config = model.config.get_text_config()
    digest = hashlib.sha256(json.dumps(_settings(config), sort_keys=True).encode())
    tied = getattr(config, "tie_word_embeddings", getattr(model.config, "tie_word_embeddings", False))
    head = None if tied else model.get_output_embeddings()
    for root in filter(None, (decoder_body(model), head)):  # whatever the model around the decoder is called
        for name, weight in _weights(root):
            digest.update(f"\n{name} {tuple(weight.shape)}".encode())
            digest.update(_sample(weight, look_up).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def keep_fingerprint(model: PreTrainedModel, sha256: str) -> None:
    """Have a model whose weights are packed keep the fingerprint of those that it had before."""
    setattr(model, _PACKED, sha256)


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    found = {name: _rounded(_setting(config, name)) for name in _SETTINGS}
    if len(set(found["layer_types"] or ())) < 2:  # newer versions say so of models whose layers are all alike
        del found["layer_types"]
    return {name: value for name, value in found.items() if value not in (None, False, {}, [])}


def _setting(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # what varies between layers, as in Gemma 4, shows in the shapes or in another setting
        return None


def _rounded(value: Any) -> Any:
    """As plain data; floats to five digits, as GGUF stores them in 32 bits, and without what is not set."""
    if isinstance(value, dict):
        return {str(key): _rounded(inner) for key, inner in sorted(value.items()) if inner is not None}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _weights(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight below a module, by its name there."""
    from accelerate.utils import align_module_device  # who takes no fingerprint need not wait for it

    for prefix, module in root.named_modules():
        if _is_idle_adapter(root, prefix):
            continue
        with align_module_device(module):  # brings in what accelerate keeps elsewhere
            for name, weight in module.named_parameters(prefix.replace(".base_layer", ""), recurse=False):
                yield from _plain(name, weight)
            for name, weight in module.named_buffers(prefix, recurse=False):
                if name.rpartition(".")[2] in _QUANTIZED:
                    yield name, weight


def _plain(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A weight, or the tensors that a quantized one is made of."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield name, weight
        return
    for inner in weight.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{inner}", getattr(weight, inner))


def _is_idle_adapter(root: nn.Module, name: str) -> bool:
    """Whether a module is part of a LoRA that is off, or adds exactly nothing, as before its training."""
    layer, found, _ = name.partition(".lora_")
    if not found:
        return False
    owner = root.get_submodule(layer)
    outer = [w for key, w in owner.named_parameters() if key.startswith(("lora_B.", "lora_embedding_B."))]
    return bool(getattr(owner, "disable_adapters", False)) or not any(bool(w.any()) for w in outer)


def _sample(weight: Tensor, look_up: LookUp) -> Tensor:
    """``[n]`` bfloat16, of a weight of any shape."""
    columns = weight.shape[-1] if weight.dim() else 1
    rows = weight.numel() // max(columns, 1)
    size = min(max(rows, columns), _MOST) if weight.numel() else 0
    place = torch.arange(size, device="cpu")
    row = place % rows if rows <= size else place * rows // size
    values = look_up(weight, row, place * _STEP % columns).float()
    return torch.where(values.abs() < _SMALLEST, 0.0, values).to(torch.bfloat16)
