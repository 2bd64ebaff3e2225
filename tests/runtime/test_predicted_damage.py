"""A model that skips with compensation, against the rule written out naively: one token, one layer at a time."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from support.factories import Kind, make_compensated
from support.naive import NaiveToken
from support.pico import (
    HIDDEN,
    N_LAYERS,
    PARALLEL,
    SUPPORTED,
    feed,
    middle_threshold,
    pico_model,
    pico_profile,
    pico_tokens,
)
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import ffnskip
from ffnskip.general.wrap import SkippableFFN
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Skip
from ffnskip.rules import may_skip

TEXT = pico_tokens(12, batch=2)
KINDS: list[tuple[Kind, int | None, int]] = [
    ("none", None, 0),
    ("mean", None, 0),
    ("linear", None, 0),
    ("linear", None, 4),
    ("low-rank", 3, 0),
    ("low-rank", 3, 4),
]
each_kind = pytest.mark.parametrize(("kind", "rank", "neurons"), KINDS, ids=str)


@cache
def llama() -> PreTrainedModel:
    return pico_model("llama", torch.float64)


def profile_of(model: PreTrainedModel, kind: Kind = "linear", **settings: object) -> Profile:
    """With a threshold of 1 nat, under which the random probes put about half of the tokens."""
    info = pico_profile(model).model.model_dump()
    return make_compensated(kind, **info | {"rule": "predicted-damage", "threshold": 1.0} | settings)


def threshold_of(rule: str) -> float:
    """With which some tokens skip; no similarity meets it so closely that rounding could decide."""
    return 1.0 if rule == "predicted-damage" else middle_threshold(llama(), TEXT) - 1e-9


@contextmanager
def decisions(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collects one bool tensor ``[batch, sequence, n_layers]`` per forward pass: who skipped."""
    passes: list[Tensor] = []
    layers: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        shape = args[0].shape[:-1]
        skipping = module.skipping if isinstance(module, SkippableFFN) else None
        layers.append(torch.zeros(shape, dtype=torch.bool) if skipping is None else skipping.view(shape))
        if len(layers) == N_LAYERS:
            passes.append(torch.stack(layers, dim=-1))
            layers.clear()

    hooks = [site.layer.get_submodule("mlp").register_forward_hook(look) for site in ffn_sites(model)]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


class NaiveDamage(NaiveToken):
    """A token under the rule `predicted-damage`; what is not written here is as under `cosine`."""

    def predicts(self, layer: int, score: float) -> bool:
        in_region = self.skip.cold_s <= layer < self.skip.cold_e
        self.skipped.append(in_region and not self.dense and score < math.log(self.skip.threshold))
        return self.skipped[-1]


@torch.inference_mode()
def naive_forward(model: PreTrainedModel, text: Tensor, profile: Profile, prompt: int = 0) -> tuple[Tensor, Tensor]:
    """Logits ``[tokens, vocabulary]`` and decisions ``[tokens, n_layers]`` of an unwrapped Llama in float64."""
    body, cache, logits, tokens = model.model, DynamicCache(config=model.config), [], []
    for position in range(len(text)):
        token = NaiveDamage(profile.skip, position - prompt)
        stream = body.embed_tokens(text[None, position : position + 1])
        rotation = body.rotary_emb(stream, torch.tensor([[position]]))
        for index, layer in enumerate(body.layers):
            attended, _ = layer.self_attn(
                layer.input_layernorm(stream), position_embeddings=rotation, attention_mask=None, past_key_values=cache
            )
            h = stream + attended
            x = layer.post_attention_layernorm(h)
            if naive_decision(profile, token, index, x[0, 0]):
                stream = h + naive_g(profile, index, layer.mlp, x[0, 0])
            else:
                stream = h + layer.mlp(x)
                if profile.skip.rule == "cosine":
                    token.ran(index, float((h * stream).sum() / (h.norm() * stream.norm())))
        tokens.append(token)
        logits.append(model.lm_head(body.norm(stream))[0, 0])
    return torch.stack(logits), torch.tensor([token.skipped for token in tokens])


def own_tensors(profile: Profile, layer: int) -> dict[str, Tensor]:
    in_region = profile.weights is not None and profile.skip.cold_s <= layer < profile.skip.cold_e
    tensors = profile.weights.tensors if in_region and profile.weights else {}
    return {name: tensor[layer - profile.skip.cold_s].double() for name, tensor in tensors.items()}


def naive_decision(profile: Profile, token: NaiveDamage, layer: int, x: Tensor) -> bool:
    if profile.skip.rule == "cosine":
        return token.skips(layer)
    own = own_tensors(profile, layer)
    return token.predicts(layer, float(x @ own["probe.weight"] + own["probe.bias"]) if own else math.inf)


def naive_g(profile: Profile, layer: int, ffn: nn.Module, x: Tensor) -> Tensor:
    """For one token, ``x [hidden]``."""
    own = own_tensors(profile, layer)
    g = own.get("bias", torch.zeros(HIDDEN, dtype=torch.float64))
    if profile.compensation.kind == "linear":
        g = g + own["linear"] @ x
    if profile.compensation.kind == "low-rank":
        g = g + own["low_rank.second"] @ (own["low_rank.first"] @ x)
    for column in range(profile.compensation.neurons):
        neuron = int(own["neurons.index"][column])
        gate, up = (ffn.get_parameter(f"{name}.weight")[neuron] for name in ("gate_proj", "up_proj"))
        g = g + own["neurons.down"][:, column] * nn.functional.silu(gate @ x) * (up @ x)
    return g


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
    profile = profile_of(llama(), kind, rank=rank, neurons=neurons, rule=rule, threshold=threshold, **settings)
    applied = ffnskip.apply(llama(), profile, mode="score", check=False)
    with applied, decisions(llama()) as passes, torch.inference_mode():
        logits = llama()(TEXT).logits
    for row in (0, 1):
        expected, skipped = naive_forward(llama(), TEXT[row], profile)
        assert torch.equal(passes[0][row], skipped)
        assert torch.allclose(logits[row], expected, atol=1e-5)
    assert 0.1 < applied.stats.skip_ratio < 0.7
    assert applied.stats.skipped == passes[0].sum(dim=(0, 1)).tolist()


@pytest.mark.parametrize("refresh_every", [None, 3])
@each_kind
def test_a_model_in_decode_mode_does_as_the_formulas_say(
    kind: Kind, rank: int | None, neurons: int, refresh_every: int | None
) -> None:
    profile = profile_of(llama(), kind, rank=rank, neurons=neurons, refresh_every=refresh_every)
    with ffnskip.apply(llama(), profile, check=False), decisions(llama()) as passes:
        logits = feed(llama(), TEXT, prompt=4)
    for row in (0, 1):
        expected, skipped = naive_forward(llama(), TEXT[row], profile, prompt=4)
        assert torch.equal(torch.cat(passes, dim=1)[row], skipped)
        assert torch.allclose(logits[row], expected, atol=1e-5)
        assert not skipped[:6].any()  # prompt and warm-up
        assert skipped[6:].any()


@pytest.mark.parametrize("rule", ["predicted-damage", "cosine"])
@each_kind
def test_both_modes_decide_alike_on_the_same_tokens(kind: Kind, rank: int | None, neurons: int, rule: str) -> None:
    threshold = threshold_of(rule)
    settings = {"rank": rank, "neurons": neurons, "rule": rule, "threshold": threshold}
    decoding, scoring = (profile_of(llama(), kind, warm_up=warm_up, **settings) for warm_up in (1, 5))
    with ffnskip.apply(llama(), decoding), decisions(llama()) as steps:
        one_by_one = feed(llama(), TEXT, prompt=4)
    with ffnskip.apply(llama(), scoring, mode="score"), decisions(llama()) as passes, torch.inference_mode():
        at_once = llama()(TEXT).logits
    assert torch.equal(torch.cat(steps, dim=1), passes[0])
    assert torch.allclose(one_by_one, at_once, atol=1e-5)
    assert passes[0][:, 5:].any()


def test_rows_of_a_batch_decide_alone() -> None:
    profile = profile_of(llama(), "low-rank", rank=3, neurons=4)
    with ffnskip.apply(llama(), profile, mode="score", check=False), torch.inference_mode():
        together = llama()(TEXT).logits
        alone = torch.cat([llama()(row[None]).logits for row in TEXT])
        with decisions(llama()) as passes:
            llama()(TEXT)
    assert torch.allclose(together, alone, atol=1e-9)
    assert not torch.equal(passes[0][0], passes[0][1])


def test_padding_skips_nothing_and_changes_no_decision() -> None:
    profile = profile_of(llama())
    mask = torch.ones_like(TEXT)
    mask[1, :5] = 0
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    applied = ffnskip.apply(llama(), profile, mode="score", check=False)
    with applied, decisions(llama()) as passes, torch.inference_mode():
        llama()(TEXT, attention_mask=mask, position_ids=position)
        llama()(TEXT[1:, 5:])
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
    assert applied.stats.skip_ratio == 0
    assert applied.stats.never_skip_fraction == 1
    assert applied.stats.checked == [0, 20, 20, 20, 20, 0]


def test_at_very_many_nats_the_whole_region_is_skipped_and_its_ffns_are_never_called() -> None:
    model, calls = llama(), [0] * N_LAYERS
    ffns = [layer.mlp for layer in model.model.layers]
    hooks = [ffn.register_forward_pre_hook(lambda module, _: add_one(calls, ffns.index(module))) for ffn in ffns]
    with ffnskip.apply(model, profile_of(model, threshold=1e300, warm_up=1), check=False) as applied:
        feed(model, TEXT, prompt=4)
    for hook in hooks:
        hook.remove()
    assert calls == [9, 2, 2, 2, 2, 9]
    assert applied.stats.skipped == applied.stats.checked == [0, 14, 14, 14, 14, 0]
    assert applied.stats.first_skipped == [0, 14, 0, 0, 0, 0]
    assert applied.stats.never_skipped == 0


def add_one(counts: list[int], index: int) -> None:
    counts[index] += 1


def test_every_token_that_may_skip_counts_as_checked_in_every_layer_of_the_region() -> None:
    profile = profile_of(llama(), cold_s=2, cold_e=4, warm_up=3, refresh_every=3)
    with ffnskip.apply(llama(), profile, mode="score") as applied, torch.inference_mode():
        llama()(TEXT)
    assert applied.stats.tokens == 2 * 9
    assert applied.stats.warm_up_tokens == 2 * 3
    assert applied.stats.checked == [0, 0, 12, 12, 0, 0]


def test_simulate_decides_each_layer_alone() -> None:
    skip: Skip = profile_of(llama(), threshold=0.5, warm_up=1).skip
    scores = torch.tensor([-9.0, -0.8, math.log(0.5), 0.0, -math.inf, -9.0]).repeat(2, 1)
    skipped = skip.by.simulate(scores, may_skip(torch.arange(2), skip), skip)
    assert skipped.tolist() == [[False] * 6, [False, True, False, False, True, False]]


@pytest.mark.parametrize("name", SUPPORTED)
def test_what_is_added_reaches_the_residual_stream_as_the_ffns_output_would(name: str) -> None:
    """In one layer, where all tokens skip: with sandwich norms, parallel attention, scaled residuals, and experts."""
    model = pico_model(name)
    profile = profile_of(model, cold_s=2, cold_e=3, warm_up=0, threshold=1e9)
    own, seen = {name: tensor.float() for name, tensor in own_tensors(profile, 2).items()}, list[Tensor]()
    with ffnskip.apply(model, profile, mode="score") as applied, torch.inference_mode():
        site = ffn_sites(model)[2]
        wrapper = site.layer.get_submodule("mlp")
        keep = wrapper.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with_g = leaving(model, site.layer)
        keep.remove()
        silence = wrapper.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        without = leaving(model, site.layer)
        silence.remove()
    assert applied.stats.skipped == [0, 0, 48, 0, 0, 0]
    added = (seen[0] @ own["linear"].T + own["bias"]) * (0.22 if name == "granite" else 1.0)
    assert torch.allclose(with_g - without, added, atol=1e-4)


def leaving(model: PreTrainedModel, layer: nn.Module) -> Tensor:
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(
        lambda module, args, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    model(TEXT)
    hook.remove()
    return seen[0]


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


@each_kind
def test_remove_restores_the_very_same_modules(kind: Kind, rank: int | None, neurons: int) -> None:
    model = pico_model("gemma2")
    before = list(model.named_modules())
    keys = model.state_dict().keys()
    with ffnskip.apply(model, profile_of(model, kind, rank=rank, neurons=neurons)) as applied:
        assert model.state_dict().keys() == keys
    applied.remove()
    after = list(model.named_modules())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(now is then for (_, now), (_, then) in zip(after, before, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for _, module in after)


def test_another_threshold_keeps_the_compensation() -> None:
    profile = profile_of(llama(), threshold=0.0)
    with ffnskip.apply(llama(), profile, mode="score", threshold=1.0) as applied, torch.inference_mode():
        moved = llama()(TEXT).logits
    assert applied.profile.weights is profile.weights
    with ffnskip.apply(llama(), profile_of(llama()), mode="score"), torch.inference_mode():
        assert torch.equal(llama()(TEXT).logits, moved)


def test_a_threshold_below_zero_nats_is_refused() -> None:
    with pytest.raises(ffnskip.FfnskipError, match="a number of nats and not -1"):
        ffnskip.apply(llama(), profile_of(llama()), threshold=-1.0)
