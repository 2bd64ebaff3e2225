"""The baselines: what each skips, how much, and on whom."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from support.factories import make_compensated
from support.pico import N_LAYERS, decisions, dense_similarities, float64_model, pico_profile, pico_tokens
from torch import Tensor

from ffnskip import Profile
from ffnskip.general.wrap import Applied
from ffnskip.profiles.identity import model_info
from ffnskip_cli.measure.baselines import Pattern, bare_profile, baseline_patterns, layer_similarities
from ffnskip_cli.progress import silently

MODEL = float64_model()
WARM_UP, LENGTH = 3, 100
TEXT = pico_tokens(LENGTH, batch=4)
RATIO = 0.4  # of 6 layers: 2.4 FFNs per token
FIXED = ("non-adaptive", "static", "shortgpt")


@cache
def bare() -> Profile:
    return bare_profile(pico_profile(MODEL, warm_up=WARM_UP), 0.6)


@cache
def patterns(ratio: float = RATIO) -> dict[str, Pattern]:
    return baseline_patterns(MODEL, bare(), ratio, TEXT, silently)


@torch.inference_mode()
def skipped(name: str, ratio: float = RATIO) -> Tensor:
    """Mean over the text, ``[LENGTH, n_layers]``: how often each position skipped each layer's FFN."""
    seen = []
    for sequence in TEXT:
        rule = patterns(ratio)[name].rule(bare(), sequence)
        with Applied(MODEL, bare(), "score", rule), decisions(MODEL) as passes:
            MODEL(sequence[None], use_cache=False)
        seen.append(passes[0][0].double())
    return torch.stack(seen).mean(0)


@pytest.mark.parametrize("name", ["random", *FIXED, "skipdecode"])
@pytest.mark.parametrize("ratio", [0.07, 0.4, 0.63])
def test_every_baseline_has_the_ratio_and_leaves_warm_up_and_cold_layers_dense(name: str, ratio: float) -> None:
    rates = skipped(name, ratio)
    tolerance = 0.02 if name == "random" else 0.005  # the ratio of independent choices holds on average only
    assert float(rates[WARM_UP:].mean()) == pytest.approx(ratio, abs=tolerance)
    assert not rates[:WARM_UP].any()
    assert not rates[:, [0, 5]].any()


def test_at_random_every_ffn_goes_alike_and_independently() -> None:
    draw = Pattern((1, 2, 3, 4), 1.0, 1.0, at_random=True).draw(20_000, N_LAYERS, seed=0)[:, 1:5].double()
    assert torch.allclose(draw.mean(0), torch.tensor(0.25, dtype=torch.float64), atol=0.015)
    assert torch.allclose(torch.corrcoef(draw.T), torch.eye(4, dtype=torch.float64), atol=0.03)


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_set_is_the_same_for_every_token_but_for_the_fraction_of_one_layer(name: str) -> None:
    rates = skipped(name)[WARM_UP:].mean(0)
    assert sorted(round(float(rate), 1) for rate in rates) == [0.0, 0.0, 0.0, 0.4, 1.0, 1.0]
    whole, partial = patterns()[name].order[:2], patterns()[name].order[2]
    assert rates[list(whole)].tolist() == [1.0, 1.0]
    assert 0 < rates[partial] < 1


def test_non_adaptive_sets_are_evenly_spread() -> None:
    profile = bare().model_copy(update={"skip": bare().skip.model_copy(update={"cold_s": 0, "cold_e": 6})})
    orders = [baseline_patterns(MODEL, profile, n / 6, TEXT, silently)["non-adaptive"].order for n in range(7)]
    assert orders == [(), (3,), (1, 4), (1, 3, 5), (0, 2, 3, 5), (0, 1, 3, 4, 5), (0, 1, 2, 3, 4, 5)]


def test_static_skips_where_the_ffn_turns_the_stream_least() -> None:
    means = dense_similarities(MODEL, TEXT).view(4, LENGTH, N_LAYERS)[:, WARM_UP:].mean((0, 1))
    ffns, _ = layer_similarities(MODEL, TEXT, WARM_UP, silently)
    assert ffns == pytest.approx(means.tolist())
    assert list(patterns()["static"].order) == sorted(range(1, 5), key=lambda layer: -means[layer])


@torch.inference_mode()
def test_shortgpt_skips_in_the_layers_of_the_lowest_block_influence() -> None:
    states = MODEL(TEXT, output_hidden_states=True).hidden_states  # the last one is behind the final norm
    influence = []
    for entered, left in pairwise(states[:-1]):
        a, b = entered[:, WARM_UP:], left[:, WARM_UP:]
        influence.append(1 - float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()))
    _, blocks = layer_similarities(MODEL, TEXT, WARM_UP, silently)
    assert blocks[:-1] == pytest.approx([1 - value for value in influence])
    assert list(patterns()["shortgpt"].order) == sorted(range(1, 5), key=lambda layer: influence[layer])
    assert patterns()["shortgpt"].order != patterns()["static"].order


def test_skipdecode_skips_more_the_later_the_token_from_the_bottom_up() -> None:
    for ratio, first, last in ((0.3, 0.0, 3.6), (0.4, 0.8, 4.0)):
        rates = skipped("skipdecode", ratio)[WARM_UP:]
        counts = rates.sum(1)
        assert torch.allclose(counts, torch.linspace(first, last, len(counts)).double(), atol=1.0)
        assert float(counts[:30].mean()) < float(counts[30:60].mean()) < float(counts[60:].mean())
        assert bool((rates[:, 1:4] >= rates[:, 2:5]).all())


def test_the_same_text_is_skipped_alike_and_another_one_is_not() -> None:
    draws = [patterns()["random"].rule(bare(), sequence).pattern for sequence in (TEXT[0], TEXT[0], TEXT[1])]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_bare_profile_spares_both_ends_unless_the_ratio_needs_them_and_needs_no_weights() -> None:
    own = model_info(MODEL, id="org/pico").model_dump()
    profile = make_compensated("linear", rule="predicted-damage", **own, cold_s=0, cold_e=6, refresh_every=4)
    found = bare_profile(profile, 0.3)
    assert found.weights is None
    assert (found.skip.cold_s, found.skip.cold_e, found.skip.refresh_every) == (2, 4, None)
    wide = bare_profile(profile, 0.9)
    assert (wide.skip.cold_s, wide.skip.cold_e) == (0, 6)
