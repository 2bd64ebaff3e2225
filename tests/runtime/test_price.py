"""The rule `price` against a model whose inputs are set to zero by hand, one layer at a time."""

from functools import cache

import pytest
import torch
from support.factories import make_profile
from support.model_types import tiny_model
from support.pico import HIDDEN, N_LAYERS, pico_model, pico_profile, pico_tokens
from support.price import price_profile
from torch import Tensor
from transformers import PreTrainedModel

import ffnskip
from ffnskip import FfnskipError, Profile, ProfileError, UnsupportedModelError
from ffnskip.general.wrap import Applied
from ffnskip.model.packed import pack_weights
from ffnskip.model.parts import ROLES, parts_of
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.profile import load_profile, save_profile
from ffnskip.rules.price import tensor_name
from ffnskip_cli.measure.flops import model_cost, overhead

TEXT = pico_tokens(14)
WIDTHS = {"attention_input": HIDDEN, "attention_output": HIDDEN, "ffn_input": HIDDEN, "neurons": 48}


@cache
def llama() -> PreTrainedModel:
    return pico_model(dtype=torch.float64)


@torch.inference_mode()
def by_hand(model: PreTrainedModel, profile: Profile) -> tuple[Tensor, Tensor]:
    """Logits ``[tokens, vocabulary]``, and how many channels of each role every layer leaves out ``[layers, 4]``."""
    assert profile.weights
    counts = torch.zeros(N_LAYERS, len(ROLES), dtype=torch.long)

    def worth(x: Tensor, index: int, role: str) -> Tensor:
        if not profile.skip.cold_s <= index < profile.skip.cold_e:
            return x
        c = profile.weights.tensors[tensor_name(role)][index - profile.skip.cold_s].double()  # type: ignore[union-attr]
        cheap = x.square() * c < profile.skip.threshold
        cheap[..., : profile.skip.warm_up, :] = False
        counts[index, ROLES.index(role)] = cheap.sum()
        return torch.where(cheap, 0.0, x)

    body = model.model
    stream = body.embed_tokens(TEXT)
    rotation = body.rotary_emb(stream, torch.arange(TEXT.shape[1])[None])
    causal = torch.full((TEXT.shape[1],) * 2, -torch.inf, dtype=stream.dtype).triu(1)[None, None]
    for index, layer in enumerate(body.layers):

        def swap(module: torch.nn.Module, args: tuple[Tensor, ...], index: int = index) -> tuple[Tensor]:
            return (worth(args[0], index, "attention_output"),)

        hook = layer.self_attn.o_proj.register_forward_pre_hook(swap)
        x = worth(layer.input_layernorm(stream), index, "attention_input")
        stream = stream + layer.self_attn(x, position_embeddings=rotation, attention_mask=causal)[0]
        hook.remove()
        x = worth(layer.post_attention_layernorm(stream), index, "ffn_input")
        activated = layer.mlp.act_fn(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
        stream = stream + layer.mlp.down_proj(worth(activated, index, "neurons"))
    return model.lm_head(body.norm(stream))[0], counts


@pytest.mark.parametrize("overrides", [{"cold_s": 0, "cold_e": N_LAYERS}, {}, {"warm_up": 5}], ids=str)
def test_channels_that_are_not_worth_their_price_are_left_out(overrides: dict[str, int]) -> None:
    profile = price_profile(llama(), **overrides)
    logits, counts = by_hand(llama(), profile)
    with ffnskip.apply(llama(), profile, mode="score") as applied, torch.inference_mode():
        assert torch.allclose(llama()(TEXT, use_cache=False).logits[0], logits, atol=1e-9)
    stats, cost = applied.stats, model_cost(llama())
    left_out = dict(zip(ROLES, counts.sum(dim=0).tolist(), strict=True))
    assert min(left_out.values()) > 0
    flops = {part.role: part.flops for part in parts_of(ffn_sites(llama())[0].layer)}
    ffn = sum(left_out[role] * flops[role] for role in ("ffn_input", "neurons"))
    assert stats.skip_ratio == pytest.approx(ffn / cost.ffn_flops / (N_LAYERS * stats.tokens))
    saved = sum(left_out[role] * flops[role] for role in ROLES)
    charged = sum(stats.checked) * 2 * sum(WIDTHS.values())
    assert cost.saved_flops(stats, overhead(profile, llama())) == pytest.approx(saved - charged)
    assert 0 < stats.least <= stats.skip_ratio
    assert stats.never_skip_fraction == 0.0


def test_decoding_leaves_out_what_scoring_does() -> None:
    profile = price_profile(llama(), warm_up=2)
    decoder = ffnskip.Decoder(llama(), profile)
    tokens = torch.stack(list(decoder.decode(TEXT[:, :4], max_new_tokens=9)), dim=1)
    with ffnskip.apply(llama(), profile.with_skip(warm_up=6), mode="score") as applied, torch.inference_mode():
        llama()(torch.cat([TEXT[:, :4], tokens[:, :-1]], dim=1), use_cache=False)
    assert decoder.stats.left_out == pytest.approx(applied.stats.left_out)
    assert decoder.stats.attention_flops == applied.stats.attention_flops


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "olmo2", "phi", "phi3", "starcoder2"])
def test_a_threshold_of_zero_leaves_out_nothing_and_another_one_something(name: str) -> None:
    model = pico_model(name)
    with ffnskip.apply(model, price_profile(model), mode="score") as applied:  # proves the former
        model(TEXT, use_cache=False)
    assert 0.0 < applied.stats.skip_ratio < 1.0


def test_packed_weights_leave_out_the_same_channels() -> None:
    model, counts = pico_model(), []
    for weights in (None, "int8"):
        if weights:
            pack_weights(model, weights)
        with ffnskip.apply(model, price_profile(model), mode="score") as applied:
            model(TEXT, use_cache=False)
        counts.append(applied.stats.skip_ratio)
    assert counts[0] == pytest.approx(counts[1], abs=0.01)


def test_what_cannot_be_left_out_is_refused_in_one_sentence() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^Layers of type GPT2Block have no plain matrices for [^\n]+\.$"):
        parts_of(ffn_sites(pico_model("gpt2"))[0].layer)
    profile = price_profile(llama())
    with (
        ffnskip.apply(llama(), profile),
        pytest.raises(FfnskipError, match=r"^The model already has a profile on: [^\n]+\.$"),
    ):
        ffnskip.apply(llama(), profile)
    assert not any(module._forward_pre_hooks for module in llama().modules())  # and it is off again


def test_a_profile_of_parts_is_written_and_read(tmp_path: object) -> None:
    profile = price_profile(llama())
    save_profile(profile, f"{tmp_path}/p.yaml")
    assert load_profile(f"{tmp_path}/p.yaml") == profile.with_weights(profile.weights)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"rule": "price", "threshold": 1e-9}, "parts: belongs to the rule price"),
        ({"parts": WIDTHS}, "parts: belongs to the rule price"),
        ({"rule": "price", "threshold": -1.0, "parts": WIDTHS}, "the threshold of price is a number of nats per FLOP"),
        (
            {"rule": "price", "threshold": 1e-9, "parts": WIDTHS, "compensation": {"kind": "mean"}},
            "compensation.kind: the rule price skips no FFN as a whole",
        ),
    ],
)
def test_sections_that_do_not_agree_are_refused(overrides: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_profile(**overrides)


def test_missing_constants_are_refused() -> None:
    profile = pico_profile(llama(), rule="price", threshold=1e-3, parts=WIDTHS)
    with pytest.raises(ProfileError, match=r"^The profile came without its weights: [^\n]+\.$"):
        ffnskip.apply(llama(), profile)


@torch.inference_mode()
def test_inputs_are_left_out_and_counted_once_when_the_gate_reads_them_last() -> None:
    model, text = tiny_model("falcon_h1"), pico_tokens(12)
    with Applied(model, price_profile(model, cold_s=0, cold_e=4, warm_up=2), "score") as applied:
        model(text, use_cache=False)
    assert applied.stats.checked == [10] * 4
