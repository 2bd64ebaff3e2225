"""Read a Hugging Face model of the Llama family as a `FusedModel`.

That it has been read correctly is proved on the model itself, by `ffnskip.Decoder`.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ffnskip.errors import UnsupportedModelError
from ffnskip.fast.fused_model import Activation, FusedLayer, FusedModel, Rope
from ffnskip.fast.layout import input_stretch, lay_out
from ffnskip.model.int4 import ROWS
from ffnskip.model.matrix import Matrix, plain
from ffnskip.model.packed import PackedEmbedding, PackedLinear
from ffnskip.model.sites import decoder_body

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "phi3"),
    *("gemma", "gemma2", "gemma3_text"),
)
_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Rotary tables of these kinds change with the length of the sequence, once it is longer than the model's original.
_GROWING_ROPE = ("dynamic", "longrope")
_NO_ROPE = "none"  # of layers without positions


def fuse(model: PreTrainedModel, *, by_input: bool = False) -> FusedModel:
    """Find a model's weights as a decode step reads them.

    The matrices are moved to where a step reads them fast (`ffnskip.fast.layout`); the model works as before.

    Args:
        model: a loaded model.
        by_input: whether the matrices of the layers lie input by input, for a step that leaves out inputs.

    Raises:
        UnsupportedModelError: the model is none of `FAMILIES`, or is built or loaded in a way that is not covered.
    """
    config, body = model.config.get_text_config(), decoder_body(model)  # of the text side, where there are pictures
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(f"Models of type {config.model_type!r} have no fused decode step.")
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError("Bidirectional attention has no fused decode step.")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UnsupportedModelError("A model that is spread over devices has no fused decode step.")
    activation = _ACTIVATIONS.get(getattr(config, "hidden_activation", None) or config.hidden_act)
    if activation is None:
        raise UnsupportedModelError("The FFN's activation function has no fused decode step.")
    eager = getattr(config, "_attn_implementation", None) == "eager"
    embedding = model.get_input_embeddings()
    norm = _norm(body.norm)
    assert norm is not None
    layers: Any = body.layers
    ropes = [_rope_type(layer.self_attn, config, index) for index, layer in enumerate(layers)]
    kinds, longest = list(dict.fromkeys(ropes)), _max_length(config)
    matrix_of(model.get_output_embeddings())  # this and the following raise before anything has been moved
    hidden = _embedding(embedding).columns
    for layer in layers:
        _check_shapes(layer, config, hidden)
    tables = tuple(_rope(body.get_submodule("rotary_emb"), kind, longest) for kind in kinds)
    lay_out([group for layer in layers for group in _groups(layer)], by_input=by_input)
    lay_out([[model.get_output_embeddings()]])  # by itself: it stays where it is when the layers are laid out anew
    return FusedModel(
        layers=[_layer(layer, config, kinds.index(rope)) for layer, rope in zip(layers, ropes, strict=True)],
        embedding=_embedding(embedding),
        norm=norm,
        head=matrix_of(model.get_output_embeddings()),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=layers[0].self_attn.head_dim,
        eps=config.rms_norm_eps,
        attention_scale=layers[0].self_attn.scaling,
        attention_cap=getattr(layers[0].self_attn, "attn_logit_softcapping", None)
        if eager
        else None,  # else HF leaves it out
        logit_cap=getattr(config, "final_logit_softcapping", None),
        embedding_scale=_embedding_scale(embedding) * getattr(config, "embedding_multiplier", 1.0),
        residual_scale=getattr(config, "residual_multiplier", 1.0),
        logit_scale=1.0 / getattr(config, "logits_scaling", 1.0),
        norm_across_heads=_norm_across_heads(layers[0].self_attn),
        activation=activation,
        max_length=longest,
        ropes=tables,
        dtype=model.dtype,
    )


def _embedding(embedding: nn.Module) -> Matrix:
    if isinstance(embedding, PackedEmbedding):
        return embedding.matrix
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    return _plain(weight, None)


def _check_shapes(layer: Any, config: Any, hidden: int) -> None:
    """Raise UnsupportedModelError unless a layer is as large as the configuration says: steps rely on it."""
    size = layer.self_attn.head_dim
    of_heads, of_kv_heads = config.num_attention_heads * size, 2 * config.num_key_value_heads * size
    qkv, out, gate_up, down = ([matrix_of(linear) for linear in group] for group in _groups(layer))
    shapes = [
        *((sum(m.rows for m in group), {m.columns for m in group}) for group in (qkv, out, gate_up, down)),
        *((norm.weight.numel(), {1}) for name in _NORMS if (norm := getattr(layer, name, None)) is not None),
    ]
    n = config.intermediate_size
    expected = [(of_heads + of_kv_heads, {hidden}), (hidden, {of_heads}), (2 * n, {hidden}), (hidden, {n})]
    of_norms = [(hidden, {1})] * (len(shapes) - len(expected))
    across, norms = _norm_across_heads(layer.self_attn), {"q_norm": of_heads, "k_norm": of_kv_heads // 2}
    heads_fit = all(
        norm.weight.numel() == (whole if across else size)
        for name, whole in norms.items()
        if (norm := getattr(layer.self_attn, name, None)) is not None
    )
    if shapes != [*expected, *of_norms] or not heads_fit:
        raise UnsupportedModelError("A layer is of another shape than the model's configuration says.")


def _groups(layer: Any) -> list[list[nn.Module]]:
    """The linear layers of a decoder layer in the order in which they are read; those of a group read the same."""
    attention, ffn = layer.self_attn, layer.mlp
    names = [
        (attention, ["qkv_proj"] if hasattr(attention, "qkv_proj") else ["q_proj", "k_proj", "v_proj"]),
        (attention, ["o_proj"]),
        (ffn, ["gate_up_proj"] if hasattr(ffn, "gate_up_proj") else ["gate_proj", "up_proj"]),
        (ffn, ["down_proj"]),
    ]
    return [[parent.get_submodule(name) for name in group] for parent, group in names]


def _layer(layer: Any, config: Any, rope: int) -> FusedLayer:
    attention, ffn = layer.self_attn, layer.mlp
    # Of the norms that a layer may have, the one behind attention is named as what is in front of the FFN where it has
    # no others around the FFN.
    behind = hasattr(layer, "post_feedforward_layernorm")
    of_heads = config.num_attention_heads * attention.head_dim
    of_kv_heads = config.num_key_value_heads * attention.head_dim
    if hasattr(attention, "qkv_proj"):  # Phi-3
        q, k, v = _slices(matrix_of(attention.qkv_proj), [of_heads, of_kv_heads, of_kv_heads])
        gate, up = _slices(matrix_of(ffn.gate_up_proj), [config.intermediate_size] * 2)
    else:
        q, k, v = map(matrix_of, (attention.q_proj, attention.k_proj, attention.v_proj))
        gate, up = map(matrix_of, (ffn.gate_proj, ffn.up_proj))
    norms = {name: _norm(getattr(layer, name, None)) for name in _NORMS}
    return FusedLayer(
        q=q,
        k=k,
        v=v,
        out=matrix_of(attention.o_proj),
        gate=gate,
        up=up,
        down=matrix_of(ffn.down_proj),
        norm_attention=norms["input_layernorm"],
        norm_ffn=norms["pre_feedforward_layernorm" if behind else "post_attention_layernorm"],
        after_attention=norms["post_attention_layernorm"] if behind else None,
        after_ffn=norms["post_feedforward_layernorm"],
        q_norm=_norm(getattr(attention, "q_norm", None)),
        k_norm=_norm(getattr(attention, "k_norm", None)),
        window=getattr(attention, "sliding_window", _window_of_all(config)),
        rope=rope,
    )


def _window_of_all(config: Any) -> int | None:
    """Of families whose attention modules do not say: Mistral and Phi-3 have one window for all layers, Llama none."""
    return config.sliding_window if config.model_type in ("mistral", "phi3") else None


def _rope_type(attention: Any, config: Any, layer: int) -> str | None:
    """Gemma 3 has a rotary table per type of layer, SmolLM3 none in some layers, and the others one for all."""
    if not getattr(attention, "use_rope", True):
        return _NO_ROPE
    return str(config.layer_types[layer]) if config.model_type == "gemma3_text" else None


@torch.inference_mode()
def _rope(rotary: Any, kind: str | None, longest: int) -> Rope:
    """A rotary embedding as numbers; raises UnsupportedModelError where the module computes something else."""
    name, of_kind = ("", ()) if kind in (None, _NO_ROPE) else (f"{kind}_", (kind,))
    original: Tensor | None = getattr(rotary, f"{name}original_inv_freq", None)
    if original is not None and kind == _NO_ROPE:
        return Rope(torch.zeros_like(original, dtype=torch.float32), 1.0)
    if original is not None:
        rope = Rope(original.float().clone(), float(getattr(rotary, f"{name}attention_scaling")))
        positions = torch.tensor([0, 1, longest - 1], device=original.device)
        like = torch.zeros(1, dtype=torch.float32, device=original.device)
        rotary(like, positions[None, :1], *of_kind)  # frequencies that have grown with a text are the original ones
        expected = rotary(like, positions[None], *of_kind)
        if all(torch.allclose(x, y[0], atol=1e-5) for x, y in zip(rope.turns(positions), expected, strict=True)):
            return rope
    raise UnsupportedModelError("The model's rotary embedding has no fused decode step.")


def _norm_across_heads(attention: Any) -> bool:
    """Whether the norm of the queries is one across all heads."""
    norm = getattr(attention, "q_norm", None)
    return norm is not None and norm.weight.numel() != attention.head_dim


def _max_length(config: Any) -> int:
    rope = config.rope_parameters
    kinds = [rope] if "rope_type" in rope else list(rope.values())
    longest = int(config.max_position_embeddings)
    if any(kind["rope_type"] in _GROWING_ROPE for kind in kinds):
        return min(longest, *(int(kind.get("original_max_position_embeddings") or longest) for kind in kinds))
    return longest


def _norm(norm: Any) -> Tensor | None:
    if norm is None:
        return None
    weight: Tensor = norm.weight.detach().float()
    return weight + 1.0 if type(norm).__name__.startswith("Gemma") else weight.clone()


def _embedding_scale(embedding: nn.Module) -> float:
    if isinstance(embedding, PackedEmbedding):
        return embedding.factor
    scale = getattr(embedding, "embed_scale", None)
    return 1.0 if scale is None else float(scale.to(embedding.weight.dtype))  # rounded as the model itself does


def matrix_of(linear: nn.Module) -> Matrix:
    """The weights and bias of a linear layer, sharing its memory.

    Raises:
        UnsupportedModelError: they are not such as steps read.
    """
    if isinstance(linear, PackedLinear):
        return linear.matrix.map(Tensor.detach)  # the module's own tensors move when it is laid out otherwise
    if type(linear) is not nn.Linear:
        raise UnsupportedModelError(f"A {type(linear).__name__} layer has no fused decode step.")
    return _plain(linear.weight, linear.bias)


def _plain(weight: Tensor, bias: Tensor | None) -> Matrix:
    if weight.dtype not in (torch.float32, torch.bfloat16):
        name = str(weight.dtype).removeprefix("torch.")
        raise UnsupportedModelError(f"The fused decode step reads no {name} weights: load the model as bfloat16.")
    if type(weight.data) is not Tensor or not (weight.is_contiguous() or input_stretch(weight)):
        raise UnsupportedModelError("The fused decode step reads plain matrices only: load the model unquantized.")
    return plain(weight, bias)


def _slices(matrix: Matrix, sizes: list[int]) -> list[Matrix]:
    if matrix.by_input and any(size % ROWS for size in sizes):
        raise UnsupportedModelError(f"The rule price has no fused decode step for int4 matrices of {sizes} rows.")
    ends = list(accumulate(sizes))
    return [matrix[end - size : end] for size, end in zip(sizes, ends, strict=True)]
