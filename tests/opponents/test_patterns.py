"""Opponents that skip whole FFNs by layer and position: what each skips, how much, and on whom."""

from functools import cache

import pytest
import torch
from support.factories import make_compensated
from support.opponents import field, opponent
from support.pico import N_LAYERS, decisions, dense_similarities, float64_model, pico_tokens
from torch import Tensor

from ffnskip.general.wrap import Applied
from ffnskip.profiles.identity import model_info
from ffnskip_cli.measure.flops import model_cost
from ffnskip_cli.opponents import Opponent
from ffnskip_cli.opponents.patterns import Pattern, ffn_similarities

MODEL = float64_model()
WARM_UP, LENGTH = 3, 100
TEXT = pico_tokens(LENGTH, batch=4)
ALL = model_cost(MODEL).ffn_share(WARM_UP, LENGTH)  # what skipping every FFN saves
RATIO = 0.4  # of 6 layers: 2.4 FFNs per token
FIXED = ("non-adaptive", "static")


@cache
def skipping(name: str, ratio: float = RATIO) -> Opponent:
    return opponent(name, MODEL, TEXT, ratio * ALL, warm_up=WARM_UP)


def pattern(name: str, ratio: float = RATIO) -> Pattern:
    way = skipping(name, ratio).way
    assert isinstance(way, Pattern)
    return way


@torch.inference_mode()
def skipped(name: str, ratio: float = RATIO) -> Tensor:
    """Mean over the text, ``[LENGTH, n_layers]``: how often each position skipped each layer's FFN."""
    seen = []
    for sequence in TEXT:
        profile = skipping(name, ratio).profile
        rule = pattern(name, ratio).rule(profile, sequence)
        with Applied(MODEL, profile, "score", rule), decisions(MODEL) as passes:
            MODEL(sequence[None], use_cache=False)
        seen.append(passes[0][0].double())
    return torch.stack(seen).mean(0)


@pytest.mark.parametrize("name", ["random", *FIXED])
@pytest.mark.parametrize("ratio", [0.07, 0.3])
def test_every_pattern_has_the_ratio_and_leaves_warm_up_and_cold_layers_dense(name: str, ratio: float) -> None:
    rates = skipped(name, ratio)
    tolerance = 0.02 if name == "random" else 0.005  # the ratio of independent choices holds on average only
    assert float(rates[WARM_UP:].mean()) == pytest.approx(ratio, abs=tolerance)
    assert not rates[:WARM_UP].any()
    assert not rates[:, [0, 1, 4, 5]].any()


def test_a_saving_that_needs_cold_layers_takes_them() -> None:
    assert not skipped("non-adaptive", 0.6)[:, [0, 5]].any()
    assert float(skipped("non-adaptive", 1.0)[WARM_UP:].mean()) == 1.0


def test_at_random_every_ffn_goes_alike_and_independently() -> None:
    draw = Pattern((1, 2, 3, 4), 1.0, 1.0, at_random=True).draw(20_000, N_LAYERS, seed=0)[:, 1:5].double()
    assert torch.allclose(draw.mean(0), torch.tensor(0.25, dtype=torch.float64), atol=0.015)
    assert torch.allclose(torch.corrcoef(draw.T), torch.eye(4, dtype=torch.float64), atol=0.03)


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_set_is_the_same_for_every_token_but_for_the_fraction_of_one_layer(name: str) -> None:
    rates = skipped(name)[WARM_UP:].mean(0)
    assert sorted(round(float(rate), 1) for rate in rates) == [0.0, 0.0, 0.0, 0.4, 1.0, 1.0]
    whole, partial = pattern(name).order[:2], pattern(name).order[2]
    assert rates[list(whole)].tolist() == [1.0, 1.0]
    assert 0 < rates[partial] < 1


def test_non_adaptive_sets_are_evenly_spread() -> None:
    orders = [pattern("non-adaptive", n / 6).order for n in range(1, 7)]
    assert orders == [(3,), (2, 3), (1, 3, 4), (1, 2, 3, 4), (0, 1, 3, 4, 5), (0, 1, 2, 3, 4, 5)]


def test_static_skips_where_the_ffn_turns_the_stream_least() -> None:
    means = dense_similarities(MODEL, TEXT).view(4, LENGTH, N_LAYERS)[:, WARM_UP:].mean((0, 1))
    assert ffn_similarities(field(MODEL, TEXT, 0.1, warm_up=WARM_UP)) == pytest.approx(means.tolist())
    assert list(pattern("static").order) == sorted(range(1, 5), key=lambda layer: -means[layer])


def test_the_same_text_is_skipped_alike_and_another_one_is_not() -> None:
    profile = skipping("random").profile
    draws = [pattern("random").rule(profile, sequence).pattern for sequence in (TEXT[0], TEXT[0], TEXT[1])]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_bare_profile_has_the_warm_up_and_needs_no_weights() -> None:
    own = model_info(MODEL, id="org/pico").model_dump()
    profile = make_compensated("linear", rule="predicted-damage", **own, cold_s=0, cold_e=6, refresh_every=4)
    bare = field(MODEL, TEXT, 0.1, profile=profile).bare(cold_s=2)
    assert bare.weights is None
    assert (bare.skip.cold_s, bare.skip.cold_e, bare.skip.refresh_every) == (2, 6, None)
    assert bare.skip.warm_up == profile.skip.warm_up
