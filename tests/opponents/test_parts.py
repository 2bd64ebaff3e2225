"""Opponents that leave out parts against their definitions, written out naively on the modules of a pico model."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from support.model_types import tiny_model
from support.opponents import field
from support.pico import float64_model, pico_profile, pico_tokens
from support.price import price_profile
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffnskip import Decoder
from ffnskip.model.sites import ffn_sites
from ffnskip_cli.bench.suite import Plan, run_suite
from ffnskip_cli.measure.flops import NO_OVERHEAD, model_cost
from ffnskip_cli.measure.quality import measure_quality
from ffnskip_cli.opponents import set_up
from ffnskip_cli.opponents.parts import Quantiles, between, greedy_paths
from ffnskip_cli.opponents.thinning import Score, Thinning, places
from ffnskip_cli.progress import silently

MODEL = float64_model()
WARM_UP, LENGTH, SAVED = 3, 40, 0.2
TEXT = pico_tokens(LENGTH, batch=3)
PROFILE = pico_profile(MODEL, warm_up=WARM_UP)
SCORES: list[Score] = ["magnitude", "with weights", "gate"]


PARTS = ["teal", "teal-greedy", "wina", "cats"]


@cache
def ways(saved: float = SAVED, model: PreTrainedModel = MODEL) -> dict[str, Thinning]:
    found, _ = set_up(PARTS, field(model, TEXT, saved, warm_up=WARM_UP))
    return {name: opponent.way for name, opponent in found.items() if isinstance(opponent.way, Thinning)}


def naive_score(score: Score, layer: nn.Module, place: int, x: Tensor) -> Tensor:
    """By the papers' definitions; `x` is what the layer's four groups of matrices read, or the activated gate."""
    if score != "with weights":
        return x.abs()
    attention, ffn = layer.self_attn, layer.mlp
    groups = [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]]
    groups += [[ffn.gate_proj, ffn.up_proj], [ffn.down_proj]]
    return x.abs() * torch.cat([matrix.weight for matrix in groups[place]]).norm(dim=0)


@torch.inference_mode()
def naive_pass(score: Score, replace: Callable[[int, int, Tensor, Tensor], Tensor], sequence: Tensor) -> Tensor:
    """Logits of the model whose every linear layer reads ``replace(layer, place, x, scores)`` instead of ``x``."""
    roles = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
    hooks = []
    for index, layer in enumerate(MODEL.model.layers):

        def see(place: int, x: Tensor, index: int = index, layer: nn.Module = layer) -> Tensor:
            return replace(index, place, x, naive_score(score, layer, place, x))

        if score == "gate":
            hooks.append(layer.mlp.act_fn.register_forward_hook(lambda module, args, output, see=see: see(0, output)))
            continue
        for name, module in layer.named_modules():
            if (role := roles.get(name.rpartition(".")[2])) is not None:
                hooks.append(
                    module.register_forward_pre_hook(lambda module, args, role=role, see=see: (see(role, args[0]),))
                )
    logits = MODEL(sequence[None], use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("score", SCORES)
def test_a_limit_is_the_quantile_of_the_score_at_its_place(score: Score) -> None:
    seen: dict[tuple[int, int], list[Tensor]] = {}

    def collect(layer: int, place: int, x: Tensor, scores: Tensor) -> Tensor:
        seen.setdefault((layer, place), []).append(scores[0, WARM_UP:].flatten())
        return x

    for sequence in TEXT:
        naive_pass(score, collect, sequence)
    quantiles = Quantiles(MODEL, score, TEXT, WARM_UP, silently)
    assert len(seen) == 6 * (1 if score == "gate" else 4)
    for (layer, place), values in seen.items():
        for sparsity in (0.1, 0.5, 0.9):
            exact = float(torch.cat(values).quantile(sparsity))
            assert quantiles.limit(layer, place, sparsity) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("name", PARTS)
def test_what_is_under_its_limit_counts_as_zero_past_the_warm_up_and_nothing_else(name: str) -> None:
    way = ways()[name]

    def thin(layer: int, place: int, x: Tensor, scores: Tensor) -> Tensor:
        small = scores < way.limits[layer][place]
        small[:, :WARM_UP] = False
        return x.masked_fill(small, 0.0)

    expected = naive_pass(way.score, thin, TEXT[0])
    with torch.inference_mode(), way.applied(MODEL, PROFILE, TEXT[0]):
        logits = MODEL(TEXT[:1], use_cache=False).logits[0]
        again = MODEL(TEXT[:1], use_cache=False).logits[0]
    assert torch.equal(logits, expected)
    assert torch.equal(again, expected)
    with torch.inference_mode():
        dense = MODEL(TEXT[:1], use_cache=False).logits[0]
    assert torch.equal(logits[:WARM_UP], dense[:WARM_UP])
    assert not torch.allclose(logits[WARM_UP:], dense[WARM_UP:])


@pytest.mark.parametrize("name", PARTS)
def test_each_saves_what_it_was_asked_for(name: str) -> None:
    (quality,) = measure_quality(MODEL, [PROFILE], TEXT, silently, ways=[ways()[name]])
    saved = model_cost(MODEL).saved_share_past(quality.stats, NO_OVERHEAD, len(TEXT), LENGTH)
    assert saved == pytest.approx(SAVED, abs=0.01)  # what is left out changes what comes later
    assert 0 < quality.stats.least < quality.skip_ratio.mean
    assert (quality.stats.attention_flops > 0) == (name != "cats")


def test_cats_charges_the_gate_which_stays_whole() -> None:
    way = Thinning("gate", ((float("inf"),),) * 6)
    (quality,) = measure_quality(MODEL, [PROFILE], TEXT, silently, ways=[way])
    assert quality.skip_ratio.mean == pytest.approx(2 / 3)
    assert quality.stats.least == pytest.approx(2 / 3)


def block_error(layer: int, limits: list[float]) -> float:
    """Sum of squares of what a thinned block's output is off by, on the dense model's inputs."""
    error = 0.0

    def thin(index: int, place: int, x: Tensor, scores: Tensor) -> Tensor:
        small = (scores < limits[place]) & (index == layer)
        small[:, :WARM_UP] = False
        return x.masked_fill(small, 0.0)

    for sequence in TEXT:
        outputs: list[Tensor] = []
        hook = MODEL.model.layers[layer].register_forward_hook(lambda *seen, kept=outputs: kept.append(seen[2]))
        naive_pass("magnitude", thin, sequence)
        naive_pass("magnitude", lambda index, place, x, scores: x, sequence)
        hook.remove()
        error += float((outputs[0] - outputs[1]).square().sum())
    return error


def test_the_greedy_search_takes_the_step_of_least_error_until_the_block_is_sparse_enough() -> None:
    quantiles = Quantiles(MODEL, "magnitude", TEXT, WARM_UP, silently)
    paths = greedy_paths(MODEL, quantiles, 0.3, TEXT, WARM_UP, silently)
    flops = [place.width * place.flops for place in quantiles.layers[0]]
    assert flops == [2 * 32 * 64, 2 * 32 * 32, 2 * 32 * 96, 2 * 48 * 32]
    for layer in (0, 4):
        for (_, before), (_, after) in zip(paths[layer][:4], paths[layer][1:5], strict=True):
            errors = []
            for place, share in enumerate(flops):
                trial = [*before]
                trial[place] += 0.02 * sum(flops) / share
                errors.append(block_error(layer, [quantiles.limit(layer, i, s) for i, s in enumerate(trial)]))
            taken = [a - b for a, b in zip(after, before, strict=True)]
            assert taken.index(max(taken)) == errors.index(min(errors))
    for path in paths:
        chosen = between(path, 0.3)
        assert sum(f * s for f, s in zip(flops, chosen, strict=True)) / sum(flops) == pytest.approx(0.3)


@pytest.mark.parametrize(("name", "gated"), [("llama", True), ("phi3", True), ("gemma2", True), ("starcoder2", False)])
def test_a_gate_is_found_where_there_is_one(name: str, gated: bool) -> None:
    model = float64_model(name)
    assert list(ways(0.1, model)) == ["teal", "teal-greedy", "wina", *(["cats"] if gated else [])]
    assert len(places(ffn_sites(model)[0], "gate")) == gated


def test_what_an_opponent_cannot_save_is_said() -> None:
    found, missing = set_up(PARTS, field(MODEL, TEXT, 0.45, warm_up=WARM_UP))
    assert list(found) == ["teal", "teal-greedy", "wina"]
    assert missing["cats"].startswith("it saves at most 0.")


@pytest.mark.parametrize(("name", "wanted"), [("falcon_h1", 0.05), ("nemotron", 0.2)])
def test_inputs_are_counted_once_in_whatever_order_they_are_read_and_zeros_count_as_saved(
    name: str, wanted: float
) -> None:
    model = tiny_model(name)
    text = pico_tokens(LENGTH, batch=2)
    profile = pico_profile(model, rule="predicted-damage", threshold=1.0, cold_s=1, cold_e=2, warm_up=WARM_UP)
    found, _ = set_up(["teal"], field(model, text, wanted, profile=profile))
    (quality,) = measure_quality(model, [profile], text, silently, ways=[found["teal"].way])
    saved = model_cost(model).saved_share_past(quality.stats, NO_OVERHEAD, *text.shape)
    assert saved == pytest.approx(wanted, abs=0.01)


def test_what_zeros_alone_save_is_the_least() -> None:
    model = tiny_model("nemotron")
    profile = pico_profile(model, rule="predicted-damage", threshold=1.0, cold_s=1, cold_e=2, warm_up=WARM_UP)
    found, missing = set_up(["teal"], field(model, pico_tokens(LENGTH, batch=2), 0.02, profile=profile))
    assert not found
    assert missing["teal"].startswith("leaving out nothing but zeros saves 0.")


def test_bench_sets_a_profile_of_parts_beside_them_at_the_same_flops() -> None:
    decoder = Decoder(MODEL, price_profile(MODEL, warm_up=WARM_UP))
    plan = Plan(frozenset({"quality", "opponents"}), 6, 9, 1, 2, ("random", *PARTS))
    dense, own, *rows = run_suite(MODEL, decoder, TEXT, plan, silently)
    assert [row["name"] for row in rows] == ["random", *PARTS]
    for row in rows:
        assert row["flops_saved_past_warm_up"] == pytest.approx(own["flops_saved_past_warm_up"], abs=0.02)
        assert row["kl"] > dense["kl"] == 0.0
