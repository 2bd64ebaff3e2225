"""Costs against torch's own counter, by hand, and against the numbers of the FFN-SkipLLM paper."""

from functools import cache
from typing import Any

import pytest
import torch
from support.factories import make_compensated
from support.model_types import tiny_model
from support.pico import HIDDEN, N_LAYERS, SUPPORTED, feed, pico_model, pico_tokens
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from ffnskip import SkipStats
from ffnskip.general.wrap import Applied
from ffnskip.profiles.identity import model_info
from ffnskip_cli.measure.flops import ModelCost, Overhead, mean_keys, model_cost, overhead

CACHED = 5  # fewer than pico's sliding windows hold
ONE_FFN = 3 * HIDDEN * 48  # weights of a gated FFN
NOTHING = Overhead(check_flops=0, check_bytes=0, added_flops=0, added_bytes=0)


@cache
def pico_cost(name: str = "llama", tied: bool = False) -> ModelCost:
    return model_cost(pico_model(name, tie_word_embeddings=tied))


def llama_2_7b() -> ModelCost:
    with torch.device("meta"):
        config = LlamaConfig(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
        )
        return model_cost(LlamaForCausalLM(config).to(torch.bfloat16))


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_decoded_token_costs_what_torch_counts(name: str) -> None:
    # the counter does not know the fused kernels of attention and of experts
    model = pico_model(name, attn_implementation="eager", experts_implementation="eager")
    past = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(pico_tokens(CACHED), past_key_values=past)
        with FlopCounterMode(display=False) as counter:
            model(pico_tokens(1), past_key_values=past)
    assert model_cost(model).dense_flops(CACHED, CACHED + 1) == counter.get_total_flops()


def test_llama_2_7b_saves_what_the_paper_says_and_has_the_ceiling_of_its_share_of_ffns() -> None:
    sixteen, cost = SkipStats(32, tokens=1, skipped=[0] * 8 + [1] * 16 + [0] * 8), llama_2_7b()
    assert cost.saved_flops(sixteen, NOTHING) == pytest.approx(4.33e9, rel=1e-3)  # half of the FFNs: its Table 4
    # 0.64 and 1.19 of all weights; the table of input embeddings is no part of what a token reads
    assert cost.n_layers * cost.ffn_bytes / cost.all_bytes == pytest.approx(0.655, abs=5e-4)
    assert cost.ceiling(SkipStats(32, tokens=4, skipped=[1] * 32), NOTHING, keys=0) == pytest.approx(1.196, abs=5e-4)


def overhead_of(dtype: torch.dtype = torch.float32, **profile: Any) -> Overhead:
    return overhead(make_compensated(**profile), pico_model(dtype=dtype))


def test_every_check_is_charged_and_checking_without_skipping_costs() -> None:
    cost, cosine = pico_cost(), overhead_of(kind="none")
    checks = SkipStats(N_LAYERS, tokens=10, checked=[0, 10, 10, 10, 0, 0])
    assert cost.saved_flops(checks, cosine) == -30 * 7 * HIDDEN
    skips = SkipStats(N_LAYERS, tokens=10, checked=[0, 10, 0, 0, 0, 0], skipped=[0, 0, 2, 2, 0, 0])
    assert cost.saved_flops(skips, cosine) == 4 * 2 * ONE_FFN - 10 * 7 * HIDDEN
    assert cost.ceiling(checks, cosine, 9) == 1.0  # a similarity reads no weights


COMPENSATIONS = [
    ({"kind": "mean"}, 0),
    ({"kind": "linear"}, HIDDEN * HIDDEN),
    ({"kind": "low-rank", "rank": 3}, 2 * HIDDEN * 3),
    ({"kind": "linear", "neurons": 5}, HIDDEN * HIDDEN + 3 * HIDDEN * 5),
    ({"kind": "low-rank", "rank": 3, "neurons": 5}, 2 * HIDDEN * 3 + 3 * HIDDEN * 5),
]


@pytest.mark.parametrize(("profile", "weights"), COMPENSATIONS)
def test_compensation_costs_its_weights_and_bias_and_a_probe_one_product(profile: dict[str, Any], weights: int) -> None:
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        found = overhead_of(dtype, **profile)
        assert (found.added_flops, found.added_bytes) == (2 * weights, size * (weights + HIDDEN))
        assert (found.check_flops, found.check_bytes) == (7 * HIDDEN, 0)
        probed = overhead_of(dtype, rule="predicted-damage", **profile)
        assert (probed.check_flops, probed.check_bytes) == (2 * HIDDEN, size * HIDDEN)
        assert (probed.added_flops, probed.added_bytes) == (found.added_flops, found.added_bytes)


@pytest.mark.parametrize(("profile", "weights"), COMPENSATIONS)
def test_a_decode_with_a_profile_costs_what_torch_counts(profile: dict[str, Any], weights: int) -> None:
    model = pico_model(attn_implementation="eager")
    own = model_info(model, id="org/pico").model_dump()
    applied_profile = make_compensated(**profile, **own, rule="predicted-damage", threshold=1.0, warm_up=2)
    text, prompt = pico_tokens(20), 4
    with Applied(model, applied_profile, "decode") as applied, FlopCounterMode(display=False) as counter:
        feed(model, text, prompt)
    with torch.inference_mode(), FlopCounterMode(display=False) as reading:
        model(text[:, :prompt])
    stats = applied.stats
    assert 0 < sum(stats.skipped) < sum(stats.checked) == 4 * stats.tokens == 4 * (20 - prompt - 2)
    cost, added = model_cost(model), overhead(applied_profile, model)
    spent = cost.dense_flops(prompt, 20) - cost.saved_flops(stats, added)
    assert spent == counter.get_total_flops() - reading.get_total_flops()


def test_the_ceiling_charges_probe_and_compensation() -> None:
    cost, added = pico_cost(), overhead_of(kind="low-rank", rank=3, rule="predicted-damage")
    stats = SkipStats(N_LAYERS, tokens=8, warm_up_tokens=2, checked=[0, 8, 8, 8, 8, 0], skipped=[0, 8, 3, 4, 0, 0])
    read = 8 * cost.all_bytes + 32 * 4 * HIDDEN - 15 * (cost.ffn_bytes - 4 * (2 * HIDDEN * 3 + HIDDEN))
    assert cost.ceiling(stats, added, keys=0) == pytest.approx(8 * cost.all_bytes / read)  # past warm-up
    cached = 8 * 2.5 * cost.bytes_per_key  # which both read
    assert cost.ceiling(stats, added, keys=2.5) == pytest.approx((8 * cost.all_bytes + cached) / (read + cached))
    assert cost.ceiling(SkipStats(N_LAYERS), NOTHING, keys=9) == 1.0
    useless = SkipStats(N_LAYERS, tokens=8, checked=[0, 8, 8, 8, 8, 0])
    assert cost.ceiling(useless, added, keys=9) < 1.0


@pytest.mark.parametrize("name", ["lfm2", "granitemoehybrid", "qwen3_next", "falcon_h1", "llava (vision)"])
def test_a_cached_position_costs_what_torch_counts_in_the_layers_that_have_any(name: str) -> None:
    model = tiny_model(name)
    model.set_attn_implementation("eager")
    past, counted = DynamicCache(config=model.config), []
    tokens = torch.arange(CACHED + 2)[None] + 20
    with torch.inference_mode():
        model(tokens[:, :CACHED], past_key_values=past)
        for token in tokens[:, CACHED:].split(1, dim=1):
            with FlopCounterMode(display=False) as counter:
                model(token, past_key_values=past)
            counted.append(counter.get_total_flops())
    assert model_cost(model).flops_per_key == counted[1] - counted[0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_cached_position_is_as_large_as_in_the_models_own_cache(name: str, dtype: torch.dtype) -> None:
    grouped = {"num_key_value_heads": None} if name.startswith(("gpt", "falcon")) else {}  # which they do not know
    model = pico_model(name, dtype, **grouped)
    past = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(pico_tokens(CACHED), past_key_values=past)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)
    assert model_cost(model).bytes_per_key == stored / CACHED


def test_the_mean_of_keys_is_over_the_steps_of_a_decode() -> None:
    prompt, new = 5, 4  # the steps feed positions 5, 6 and 7, which attend to 6, 7 and 8 of them
    assert mean_keys(prompt, new) == 7


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bytes_are_those_of_all_matrices_that_are_multiplied_in_their_dtype(name: str) -> None:
    model = pico_model(name, tie_word_embeddings=True)
    tables = [model.get_input_embeddings().weight, *(p for n, p in model.named_parameters() if "wpe" in n)]
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    multiplied = [p for p in matrices if p is tables[0] or not any(p is table for table in tables)]
    assert pico_cost(name, tied=True).all_bytes == 4 * sum(p.numel() for p in multiplied)
    assert pico_cost(name, tied=False) == pico_cost(name, tied=True)
    narrow = model_cost(pico_model(name, torch.bfloat16))
    assert (narrow.ffn_bytes, narrow.all_bytes) == (pico_cost(name).ffn_bytes / 2, pico_cost(name).all_bytes / 2)
    assert narrow.dense_flops(0, 9) == pico_cost(name).dense_flops(0, 9)


def test_a_mixture_is_charged_for_the_experts_that_a_token_meets() -> None:
    router = 4 * HIDDEN
    assert pico_cost("mixtral").ffn_bytes == 4 * (2 * ONE_FFN + router)
    assert pico_cost("mixtral").ffn_flops == 2 * (2 * ONE_FFN + router)
