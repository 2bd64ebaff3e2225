"""Laying a model's weights out for a fused step: nothing is held twice, and the model goes on working."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from support.compiler import needs_compiler
from support.pico import SUPPORTED, pack_in_turns, pico_model, pico_tokens
from torch import nn
from transformers import PreTrainedModel

from ffnskip import Decoder, FfnskipError, UnsupportedModelError, pack_weights
from ffnskip.fast.families import FAMILIES, fuse
from ffnskip.model.matrix import Matrix
from ffnskip.model.packed import PackedEmbedding, PackedLinear

TEXT = pico_tokens(12)


def storages(model: PreTrainedModel) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fused_model_shares_the_weights_of_a_model_that_computes_what_it_did(name: str) -> None:
    model = pico_model(name)
    before = model(TEXT).logits
    fused = fuse(model)
    assert torch.equal(model(TEXT).logits, before)
    matrices = [m for layer in fused.layers for m in vars(layer).values() if isinstance(m, Matrix)]
    assert {matrix.data.untyped_storage().data_ptr() for matrix in matrices} <= storages(model)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_matrices_lie_side_by_side_and_nothing_is_held_twice(packed: bool, tied: bool) -> None:
    model = pico_model("qwen2", tie_word_embeddings=tied)
    if packed:
        pack_weights(model, "int8")
    before = model(TEXT).logits
    fused = fuse(model)
    layer = fused.layers[2]
    assert torch.equal(model(TEXT).logits, before)
    assert layer.qkv.data.data_ptr() == layer.q.data.data_ptr()
    assert layer.gate_up.data.data_ptr() == layer.gate.data.data_ptr()
    assert torch.equal(layer.qkv.data, torch.cat([layer.q.data, layer.k.data, layer.v.data]))
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
    assert sum(storages.values()) < sum(t.nbytes for t in tensors.values()) + 64 * len(tensors)
    assert (fused.embedding.data.data_ptr() == fused.head.data.data_ptr()) == tied


def test_a_laid_out_model_can_be_copied_and_saved(tmp_path: Path) -> None:
    model = pico_model()
    before = model(TEXT).logits
    fuse(model)
    assert torch.equal(deepcopy(model)(TEXT).logits, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(TEXT).logits, before)


def test_windows_and_rotary_tables_are_those_of_each_layer() -> None:
    assert {layer.window for layer in fuse(pico_model("llama")).layers} == {None}
    assert {layer.window for layer in fuse(pico_model("mistral")).layers} == {8}
    model = pico_model("gemma3_text")
    gemma = fuse(model)
    cos, sin = gemma.rotary_tables(9)
    assert cos.shape == sin.shape == (2, 9, 8)
    for layer, kind in zip(gemma.layers, model.config.layer_types, strict=True):
        assert layer.window == (8 if kind == "sliding_attention" else None)
        expected = model.model.rotary_emb(torch.zeros(1), torch.arange(9)[None], kind)
        assert torch.equal(torch.stack([cos[layer.rope], sin[layer.rope]]), torch.cat(expected))
    assert not torch.equal(cos[0], cos[1])


def test_a_rotary_embedding_that_computes_something_else_is_not_fused() -> None:
    model = pico_model()
    turn = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, positions: turn(x, 2 * positions)
    with pytest.raises(UnsupportedModelError, match="rotary embedding"):
        fuse(model)
    del model.model.rotary_emb.forward, model.model.rotary_emb.original_inv_freq
    with pytest.raises(UnsupportedModelError, match="rotary embedding"):
        fuse(model)


def test_tables_that_grow_with_the_text_hold_for_the_original_length() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 64}
    assert fuse(pico_model()).max_length == 128
    assert fuse(pico_model(rope_parameters=rope)).max_length == 64


@pytest.mark.parametrize("name", sorted(set(SUPPORTED) - set(FAMILIES)))
def test_other_architectures_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="have no fused decode step"):
        fuse(pico_model(name))


def test_what_is_no_plain_matrix_is_refused() -> None:
    model = pico_model()
    model.model.layers[3].mlp.down_proj = nn.Sequential(model.model.layers[3].mlp.down_proj)
    with pytest.raises(UnsupportedModelError, match="A Sequential layer has no fused decode step"):
        fuse(model)
    with pytest.raises(UnsupportedModelError, match="reads no float64 weights: load the model as bfloat16"):
        fuse(pico_model(dtype=torch.float64))


@pytest.mark.parametrize("tied", [True, False])
def test_packing_rounds_every_matrix_once_and_frees_the_old_ones(tied: bool) -> None:
    model = pico_model(tie_word_embeddings=tied)
    before = model(TEXT).logits
    whole = sum(p.nbytes for p in model.parameters())
    pack_weights(model, "int8")
    after = model(TEXT).logits
    assert 0 < float((after - before).detach().norm() / before.detach().norm()) < 0.05
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 6 * 7 + 1
    assert isinstance(model.get_input_embeddings(), PackedEmbedding) == tied
    left = sum(p.nbytes for p in model.parameters()) + sum(m.matrix.nbytes for m in packed)
    assert left < (0.35 if tied else 0.5) * whole
    fused = fuse(model)
    assert torch.equal(model(TEXT).logits, after)
    assert fused.layers[0].gate.format == fused.head.format == "int8"


def test_a_packed_model_cannot_be_packed_again_or_saved(tmp_path: Path) -> None:
    model = pico_model()
    pack_weights(model, "int8")
    with pytest.raises(FfnskipError, match="is packed or quantized already"):
        pack_weights(model, "int8")
    with pytest.raises(FfnskipError, match=r"saved by ffnskip\.save_packed"):
        model.save_pretrained(tmp_path)


def test_a_format_that_does_not_fit_changes_nothing() -> None:
    model = pico_model()  # whose down projection has rows of 48
    with pytest.raises(FfnskipError, match="not 48: choose int8"):
        pack_weights(model, "int4")
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_layers_of_another_shape_than_the_configuration_are_refused() -> None:
    model = pico_model()
    ffn = model.model.layers[3].mlp
    ffn.gate_proj, ffn.up_proj, ffn.down_proj = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
    with pytest.raises(UnsupportedModelError, match="of another shape than the model's configuration says"):
        fuse(model)


def test_a_model_that_was_laid_out_in_inference_mode_can_be_trained() -> None:
    model = pico_model()
    with torch.inference_mode():
        fuse(model)
    model(TEXT, labels=TEXT).loss.backward()
    assert model.model.layers[0].mlp.gate_proj.weight.grad is not None


def test_packing_to_int4_looks_at_the_inputs_of_each_matrix() -> None:
    model = pico_model(intermediate_size=64)
    linear, name = model.model.layers[0].mlp.gate_proj, "model.layers.0.mlp.gate_proj"
    weight, norm = linear.weight.detach().clone(), model.model.layers[0].post_attention_layernorm.weight
    with torch.no_grad():
        norm.copy_(torch.where(torch.arange(len(norm)) < 8, 100.0, 0.01))
    pack_weights(model, "int4")
    error = (model.get_submodule(name).weight - weight).square().mean(dim=0)
    assert error[:8].mean() < 0.7 * error[8:].mean()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_head_that_is_the_embedding_too_keeps_columns_that_only_the_embedding_needs() -> None:
    errors = []
    for tied in (True, False):
        model = pico_model(intermediate_size=64, tie_word_embeddings=tied)
        with torch.no_grad():
            model.model.norm.weight.copy_(torch.where(torch.arange(32) < 8, 100.0, 0.01))
        weight = model.lm_head.weight.detach().clone()
        pack_weights(model, "int4")
        errors.append(float(((model.lm_head.weight - weight)[:, 8:].square().mean() / weight.square().mean()).sqrt()))
    assert errors[0] < 0.9 * errors[1]


@needs_compiler
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_matrices_of_two_formats_lie_apart_and_give_the_same_tokens(name: str) -> None:
    model = pico_model(name, intermediate_size=64)
    pack_in_turns(model)
    expected = model(TEXT).logits
    fused = fuse(model)
    assert torch.equal(model(TEXT).logits, expected)
    first = fused.layers[0]
    assert first.q.format != first.k.format
    assert Decoder(model).path == "fused"  # whose check compares its logits with the model's
    with pytest.raises(UnsupportedModelError, match="are not read as one"):
        _ = first.qkv
