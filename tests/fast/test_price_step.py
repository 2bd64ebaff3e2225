"""The fused step of the rule `price` against the general path, and where it has the weights lie."""

from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from support.compiler import needs_compiler
from support.pico import pack_in_turns, pico_model, pico_tokens
from support.price import price_profile
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffnskip import Decoder, Profile, SkipStats, apply, pack_weights
from ffnskip.fast.engine import FusedEngine
from ffnskip.fast.families import FAMILIES, fuse
from ffnskip.fast.layout import input_stretch, lay_out

pytestmark = needs_compiler

TEXT = pico_tokens(10, batch=3)
PADDED = torch.ones_like(TEXT)
PADDED[1, :4] = 0
ROUND = {"hidden_size": 64, "intermediate_size": 192, "num_key_value_heads": 4, "head_dim": 16}  # sizes for int4


def decode(decoder: Decoder, prompts: Tensor, **options: object) -> list[list[int]]:
    return [step.tolist() for step in decoder.decode(prompts, max_new_tokens=30, **options)]  # type: ignore[arg-type]


def same(fused: SkipStats, general: SkipStats) -> bool:
    return all(value == pytest.approx(asdict(general)[name], rel=1e-12) for name, value in asdict(fused).items())


def decide_alike(model: PreTrainedModel, profile: Profile, prompts: Tensor, **options: object) -> SkipStats:
    general = Decoder(model, profile, path="general")
    expected = decode(general, prompts, **options)
    fused = Decoder(model, profile, path="fused")
    assert decode(fused, prompts, **options) == expected
    assert same(fused.stats, general.stats)
    return fused.stats


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_decides_as_the_general_path_does(name: str, batch: int) -> None:
    model = pico_model(name)
    mask = PADDED if batch > 1 else None
    profile = price_profile(model, cold_s=0, cold_e=6)
    stats = decide_alike(model, profile, TEXT[:batch], attention_mask=mask, stop_tokens=range(3, 6))
    assert 0.05 < stats.least < stats.skip_ratio < 0.95
    assert stats.attention_flops > 0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("overrides", [{}, {"warm_up": 5}, {"warm_up": 3, "refresh_every": 4}], ids=str)
def test_warm_up_and_refreshing_tokens_run_dense(overrides: dict[str, int], batch: int) -> None:
    model = pico_model("qwen3")
    stats = decide_alike(model, price_profile(model, **overrides), TEXT[:batch], stop_tokens=range(3, 20))
    assert (stats.least == 0) == ("refresh_every" in overrides)
    assert (stats.warm_up_tokens > 0) == ("warm_up" in overrides)


@pytest.mark.parametrize("threshold", [0.0, 1e9])
def test_everything_and_nothing_can_be_left_out(threshold: float) -> None:
    model = pico_model("qwen2")
    stats = decide_alike(model, price_profile(model, threshold, cold_s=0, cold_e=6), TEXT)
    assert stats.skip_ratio == stats.least == pytest.approx(float(threshold > 0))


@pytest.mark.parametrize("threads", [2, 3], indirect=True)
@pytest.mark.usefixtures("threads")
def test_threads_that_share_out_the_inputs_decide_as_one_does() -> None:
    model = pico_model("gemma2")
    decide_alike(model, price_profile(model), TEXT)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4"])
def test_narrower_weights_give_the_logits_of_the_model_and_leave_out_as_much(format: str, batch: int) -> None:
    wide, model = pico_model(**ROUND), pico_model(**ROUND)
    if format == "bfloat16":
        model.bfloat16()
    else:
        pack_weights(model, format)  # type: ignore[arg-type]
    ratios = []
    for each in (wide, model):
        decoder = Decoder(each, price_profile(each), path="fused")  # whose check compares dense steps with the model
        decode(decoder, TEXT[:batch])
        ratios.append(decoder.stats.skip_ratio)
    assert ratios[0] == pytest.approx(ratios[1], abs=0.05)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("name", ["qwen2", "qwen2-mixed", "phi3", "gemma2"])
@pytest.mark.usefixtures("threads")
def test_along_a_text_int4_leaves_out_what_the_general_path_does(name: str) -> None:
    model = pico_model(name.removesuffix("-mixed"), **ROUND)
    if "mixed" in name:
        pack_in_turns(model)
    else:
        pack_weights(model, "int4")
    profile, text = price_profile(model), pico_tokens(60)
    no, yes = torch.zeros(1, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    engine = FusedEngine(model, profile)
    step = engine.step(1, 60)
    logits = torch.stack([step(token, no, yes, yes)[0].clone() for token in text.T])
    stats = SkipStats(len(engine.fused.layers), tokens=60)
    step.drain_counts(stats)
    with apply(model, profile, mode="score") as applied, torch.no_grad():
        expected = model(text, use_cache=False).logits[0]
    errors = (logits - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.median() < 0.15  # where an input is very near its limit, it is left out here and not there
    assert stats.skip_ratio == pytest.approx(applied.stats.skip_ratio, abs=0.002)
    assert stats.attention_flops == pytest.approx(applied.stats.attention_flops, rel=0.005)


def test_int4_matrices_of_odd_sizes_take_the_general_path() -> None:
    model = pico_model(intermediate_size=64)
    pack_weights(model, "int4")
    why = "The rule price has a fused decode step for int4 matrices of a multiple of 64 rows, not 32."
    assert Decoder(model, price_profile(model)).why_general == why


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_the_modules_are_views_of_matrices_that_lie_input_by_input(name: str, packed: bool) -> None:
    model = pico_model(name, tie_word_embeddings=True)
    if packed:
        pack_weights(model, "int8")
    before = model(TEXT).logits
    fused = fuse(model, by_input=True)
    assert torch.equal(model(TEXT).logits, before)
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
    assert sum(storages.values()) < sum(t.nbytes for t in tensors.values()) + 64 * len(tensors)
    layer = fused.layers[2]
    for group in ((layer.q, layer.k, layer.v), (layer.out,), (layer.gate, layer.up), (layer.down,)):
        stretch = sum(matrix.rows for matrix in group)
        assert {input_stretch(matrix.data) for matrix in group} == {stretch}
        starts = [matrix.data.data_ptr() for matrix in group]
        sizes = [matrix.rows * matrix.data.element_size() for matrix in group]
        assert starts[1:] == [start + size for start, size in zip(starts, sizes, strict=True)][:-1]
        assert group[0].data.untyped_storage().data_ptr() in storages
    assert torch.equal(layer.gate_up.data, torch.cat([layer.gate.data, layer.up.data]))
    assert fused.head.data.is_contiguous()


@pytest.mark.parametrize("by_input", [True, False])
def test_elsewhere_than_on_a_cpu_each_group_that_lies_otherwise_is_moved(by_input: bool) -> None:
    group = [nn.Linear(6, rows, device="meta") for rows in (4, 2, 2)]
    lay_out([group], by_input=not by_input)
    lay_out([group], by_input=by_input)
    assert [input_stretch(linear.weight) for linear in group] == [8 * by_input] * 3
    assert [linear.weight.storage_offset() for linear in group] == ([0, 4, 6] if by_input else [0, 24, 36])
    assert {linear.weight.untyped_storage().nbytes() for linear in group} == {8 * 6 * 4}


def test_dense_decoders_and_others_may_take_turns_on_a_model(tmp_path: Path) -> None:
    model = pico_model()
    logits, profile = model(TEXT).logits, price_profile(pico_model())
    expected = [decode(Decoder(pico_model(), chosen, path="general"), TEXT) for chosen in (None, profile)]
    decoders = [Decoder(model, chosen, path="fused") for chosen in (None, profile)]
    assert isinstance(model.model.layers[0].mlp.gate_proj, nn.Linear)
    assert not model.model.layers[0].mlp.gate_proj.weight.is_contiguous()
    assert [decode(decoder, TEXT) for decoder in decoders] == expected
    assert torch.equal(model(TEXT).logits, logits)
    assert torch.equal(deepcopy(model)(TEXT).logits, logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(TEXT).logits, logits)
    assert decode(Decoder(model, path="fused"), TEXT) == expected[0]
    assert model.model.layers[0].mlp.gate_proj.weight.is_contiguous()


@pytest.mark.parametrize("format", [None, "int8"])
def test_a_dense_decoder_of_the_same_model_keeps_its_own_layout(format: str | None) -> None:
    model = pico_model("llama")
    if format:
        pack_weights(model, format)  # type: ignore[arg-type]
    dense = Decoder(model, path="fused")  # lays the matrices out row by row
    expected = decode(Decoder(model, path="general"), TEXT)
    parts = Decoder(model, price_profile(model), path="fused")
    assert decode(dense, TEXT) == expected
    assert parts.stats.tokens == 0
    decode(parts, TEXT)
    assert decode(dense, TEXT) == expected
