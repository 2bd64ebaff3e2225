"""A model that skips with compensation, against the rule written out naively: one token, one layer at a time."""

import math

import pytest
import torch
from support.factories import Kind, each_kind, make_compensated
from support.naive import naive_forward, tensors_of_layer
from support.pico import (
    N_LAYERS,
    PARALLEL,
    SUPPORTED,
    decisions,
    entering_and_leaving,
    feed,
    ffn_runs,
    float64_model,
    middle_threshold,
    pico_model,
    pico_profile,
    pico_tokens,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

import ffnskip
from ffnskip.general.skippable import skippable
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Skip
from ffnskip.rules import may_skip

TEXT = pico_tokens(12, batch=2)


def profile_of(model: PreTrainedModel, kind: Kind = "linear", **settings: object) -> Profile:
    """With a threshold of 1 nat, under which the random probes put about half of the tokens."""
    info = pico_profile(model).model.model_dump()
    return make_compensated(kind, **info | {"rule": "predicted-damage", "threshold": 1.0} | settings)


def threshold_of(rule: str) -> float:
    """With which some tokens skip; no similarity meets it so closely that rounding could decide."""
    return 1.0 if rule == "predicted-damage" else middle_threshold(float64_model(), TEXT) - 1e-9


def skipping(module: nn.Module, output: Tensor) -> Tensor:
    """Who skips, whatever is added for the FFN."""
    ffn = skippable(module)
    decided = None if ffn is None else ffn.skipping
    return torch.zeros(output.shape[:-1], dtype=torch.bool) if decided is None else decided.view(output.shape[:-1])


SETTINGS: list[dict[str, int | None]] = [
    {"cold_s": 1, "cold_e": 5, "warm_up": 2},
    {"cold_s": 0, "cold_e": N_LAYERS, "warm_up": 0, "refresh_every": 3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["middle", "all-refreshed"])
@pytest.mark.parametrize("rule", ["predicted-damage", "cosine"])
@each_kind
def test_a_model_in_score_mode_does_as_the_formulas_say(
    kind: Kind, rank: int | None, neurons: int, rule: str, settings: dict[str, int | None]
) -> None:
    threshold = threshold_of(rule)
    profile = profile_of(float64_model(), kind, rank=rank, neurons=neurons, rule=rule, threshold=threshold, **settings)
    applied = ffnskip.apply(float64_model(), profile, mode="score", check=False)
    with applied, decisions(float64_model(), skipping) as passes, torch.inference_mode():
        logits = float64_model()(TEXT).logits
    for row in (0, 1):
        naive = naive_forward(float64_model(), TEXT[row], profile.skip, weights=profile.weights)
        assert torch.equal(passes[0][row], naive.skipped)
        assert torch.allclose(logits[row], naive.logits, atol=1e-5)
    assert 0.1 < applied.stats.skip_ratio < 0.7
    assert applied.stats.skipped == passes[0].sum(dim=(0, 1)).tolist()


@pytest.mark.parametrize("refresh_every", [None, 3])
@pytest.mark.parametrize("rule", ["predicted-damage", "cosine"])
@each_kind
def test_a_model_in_decode_mode_does_as_the_formulas_say(
    kind: Kind, rank: int | None, neurons: int, rule: str, refresh_every: int | None
) -> None:
    settings = {"rule": rule, "threshold": threshold_of(rule), "refresh_every": refresh_every}
    profile = profile_of(float64_model(), kind, rank=rank, neurons=neurons, **settings)
    with ffnskip.apply(float64_model(), profile, check=False), decisions(float64_model(), skipping) as passes:
        logits = feed(float64_model(), TEXT, prompt=4)
    for row in (0, 1):
        naive = naive_forward(float64_model(), TEXT[row], profile.skip, 4, profile.weights)
        assert torch.equal(torch.cat(passes, dim=1)[row], naive.skipped)
        assert torch.allclose(logits[row], naive.logits, atol=1e-5)
        assert not naive.skipped[:6].any()  # prompt and warm-up
        assert naive.skipped[6:].any()


def test_padding_skips_nothing_and_changes_no_decision() -> None:
    profile = profile_of(float64_model())
    mask = torch.ones_like(TEXT)
    mask[1, :5] = 0
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    applied = ffnskip.apply(float64_model(), profile, mode="score", check=False)
    with applied, decisions(float64_model(), skipping) as passes, torch.inference_mode():
        float64_model()(TEXT, attention_mask=mask, position_ids=position)
        float64_model()(TEXT[1:, 5:])
    padded, alone = passes[0][1], passes[1][0]
    assert not padded[:5].any()
    assert torch.equal(padded[5:], alone)
    assert applied.stats.tokens == 10 + 5 + 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_kind
def test_at_zero_nats_nothing_is_skipped_and_every_logit_is_the_models_own(
    kind: Kind, rank: int | None, neurons: int, dtype: torch.dtype
) -> None:
    model = pico_model(dtype=dtype)
    profile = profile_of(model, kind, rank=rank, neurons=neurons, threshold=0.0)
    with torch.inference_mode():
        dense = model(TEXT).logits
        with ffnskip.apply(model, profile, mode="score") as applied:
            assert torch.equal(model(TEXT).logits, dense)
        assert torch.equal(model(TEXT).logits, dense)
    assert (applied.stats.skip_ratio, applied.stats.never_skip_fraction) == (0, 1)
    assert applied.stats.checked == [0, 20, 20, 20, 20, 0]


def test_at_very_many_nats_the_whole_region_is_skipped_and_its_ffns_are_never_called() -> None:
    model = float64_model()
    profile = profile_of(model, threshold=1e300, warm_up=1)
    with ffn_runs(model) as runs, ffnskip.apply(model, profile, check=False) as applied:
        feed(model, TEXT, prompt=4)
    assert [len(run) for run in runs] == [9, 2, 2, 2, 2, 9]
    assert applied.stats.skipped == applied.stats.checked == [0, 14, 14, 14, 14, 0]
    assert applied.stats.first_skipped == [0, 14, 0, 0, 0, 0]
    assert applied.stats.never_skipped == 0


def test_every_token_that_may_skip_counts_as_checked_in_every_layer_of_the_region() -> None:
    profile = profile_of(float64_model(), cold_s=2, cold_e=4, warm_up=3, refresh_every=3)
    with ffnskip.apply(float64_model(), profile, mode="score") as applied, torch.inference_mode():
        float64_model()(TEXT)
    assert (applied.stats.tokens, applied.stats.warm_up_tokens) == (2 * 9, 2 * 3)
    assert applied.stats.checked == [0, 0, 12, 12, 0, 0]


def test_simulate_decides_each_layer_alone() -> None:
    skip: Skip = profile_of(float64_model(), threshold=0.5, warm_up=1).skip
    scores = torch.tensor([-9.0, -0.8, math.log(0.5), 0.0, -math.inf, -9.0]).repeat(2, 1)
    skipped = skip.by.simulate(scores, may_skip(torch.arange(2), skip), skip)
    assert skipped.tolist() == [[False] * 6, [False, True, False, False, True, False]]


@pytest.mark.parametrize("name", SUPPORTED)
def test_what_is_added_reaches_the_residual_stream_as_the_ffns_output_would(name: str) -> None:
    """In one layer, where all tokens skip: with sandwich norms, parallel attention, scaled residuals, and experts."""
    model = pico_model(name)
    profile = profile_of(model, cold_s=2, cold_e=3, warm_up=0, threshold=1e9)
    tensors, seen = tensors_of_layer(profile.skip, profile.weights, 2), list[Tensor]()
    with ffnskip.apply(model, profile, mode="score") as applied, torch.inference_mode():
        site = ffn_sites(model)[2]
        ffn = site.ffn
        keep = ffn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        _, with_g = entering_and_leaving(model, site.layer, TEXT)
        keep.remove()
        silence = ffn.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        _, without = entering_and_leaving(model, site.layer, TEXT)
        silence.remove()
    assert applied.stats.skipped == [0, 0, 48, 0, 0, 0]
    added = (seen[0].double() @ tensors["linear"].T + tensors["bias"]).float() * (0.22 if name == "granite" else 1.0)
    assert torch.allclose(with_g - without, added, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", *PARALLEL[:2]])
def test_some_tokens_skip_in_bfloat16_and_under_autocast(name: str) -> None:
    narrow, wide = pico_model(name, torch.bfloat16), pico_model(name)
    profile = profile_of(wide, "low-rank", rank=3, neurons=0 if name == "phi" else 4)
    with ffnskip.apply(narrow, profile, mode="score") as half, torch.inference_mode():
        assert narrow(TEXT).logits.dtype == torch.bfloat16
    with ffnskip.apply(wide, profile, mode="score") as full, torch.inference_mode():
        exact = wide(TEXT).logits
    with ffnskip.apply(wide, profile, mode="score") as cast, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert wide(TEXT).logits.isfinite().all()
    assert exact.isfinite().all()
    for other in (half, cast):
        assert other.stats.skip_ratio == pytest.approx(full.stats.skip_ratio, abs=0.05)
    assert 0.1 < full.stats.skip_ratio < 0.6


@pytest.mark.parametrize("threshold", [1.0, 1e9], ids=["some", "all"])
@each_kind
def test_every_compensation_works_under_autocast(kind: Kind, rank: int | None, neurons: int, threshold: float) -> None:
    model = pico_model()
    profile = profile_of(model, kind, rank=rank, neurons=neurons, threshold=threshold)
    with ffnskip.apply(model, profile, mode="score"), torch.inference_mode():
        exact = model(TEXT).logits
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(TEXT).logits
    difference = (rounded.float() - exact)[:, -1].norm() / exact[:, -1].norm()
    assert difference < (0.05 if threshold > 1 else 1.0)  # where some skip, others may once rounded


def test_gradients_flow_after_a_pass_in_inference_mode() -> None:
    model = pico_model()
    profile = profile_of(model, neurons=4)
    with torch.inference_mode():
        applied = ffnskip.apply(model, profile, mode="score")
        model(TEXT)
    model(TEXT).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    applied.remove()
