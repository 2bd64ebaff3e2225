"""Putting a profile on every architecture, proving that it is on, and taking it off again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pico import (
    N_LAYERS,
    PARALLEL,
    REFUSED,
    SUPPORTED,
    decisions,
    dense_similarities,
    entering_and_leaving,
    ffn_runs,
    middle_threshold,
    pico_model,
    pico_profile,
    pico_tokens,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import ffnskip
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.evidence import CurvePoint
from ffnskip.profiles.profile import save_profile

TEXT = pico_tokens(12, batch=2)


@pytest.fixture(scope="module", params=SUPPORTED)
def each_model(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel]:
    return request.param, pico_model(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return pico_model("llama")


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    result: Tensor = model(TEXT).logits
    return result


def ffns(model: PreTrainedModel) -> list[nn.Module]:
    return [site.ffn for site in ffn_sites(model)]


def test_out_of_reach_every_logit_is_the_models_own_and_remove_restores_the_very_same_modules(
    each_model: tuple[str, PreTrainedModel],
) -> None:
    _, model = each_model
    dense, before = logits(model), list(model.named_modules())
    profile = pico_profile(model, threshold=2.0, warm_up=0)
    with ffnskip.apply(model, profile, mode="score") as applied:
        assert torch.equal(logits(model), dense)
    with pytest.raises(KeyboardInterrupt), ffnskip.apply(model, profile):
        raise KeyboardInterrupt
    assert (applied.stats.tokens, applied.stats.skip_ratio) == (TEXT.numel(), 0)
    applied.remove()
    after = list(model.named_modules())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(now is then for (_, now), (_, then) in zip(after, before, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for _, module in after)
    assert torch.equal(logits(model), dense)


def test_a_skipped_ffn_is_not_run_for_that_token(each_model: tuple[str, PreTrainedModel]) -> None:
    _, model = each_model
    dense, profile = logits(model), pico_profile(model, threshold=middle_threshold(model, TEXT))
    with ffn_runs(model) as runs, ffnskip.apply(model, profile, mode="score", check=False) as applied:
        skipping = logits(model)
    assert 0 < applied.stats.skip_ratio < 0.5
    assert not torch.equal(skipping, dense)
    rows_run = [sum(run) for run in runs]
    assert [run + skipped for run, skipped in zip(rows_run, applied.stats.skipped, strict=True)] == [24] * N_LAYERS


def test_similarity_is_taken_where_the_residual_stream_is(each_model: tuple[str, PreTrainedModel]) -> None:
    """Computed from the layer's input and output alone: what the layer gives with its FFN silenced, and without."""
    name, model = each_model
    site = ffn_sites(model)[1]
    layer = site.layer
    entered, left = entering_and_leaving(model, layer, TEXT)
    silence = site.ffn.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    _, without_ffn = entering_and_leaving(model, layer, TEXT)
    silence.remove()
    h = entered if name in PARALLEL else without_ffn
    similarities = torch.cosine_similarity(h, h + left - without_ffn, dim=-1)
    ordered = similarities.flatten().sort().values
    threshold = float(ordered[11] + ordered[12]) / 2
    profile = pico_profile(model, cold_s=1, cold_e=3, warm_up=0, threshold=threshold)
    with ffnskip.apply(model, profile, mode="score"), decisions(model) as passes:
        logits(model)
    assert torch.equal(passes[0][..., 2], similarities >= threshold)


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_an_ffn_module_of_its_own_are_refused(name: str) -> None:
    model = pico_model(name)
    with pytest.raises(ffnskip.UnsupportedModelError, match=r"^[^\n]+\.$"):
        ffnskip.apply(model, pico_profile(model))


@pytest.mark.parametrize(
    ("field", "value"), [("model_type", "mistral"), ("n_layers", 8), ("hidden_size", 64), ("config_sha256", "f" * 64)]
)
def test_a_profile_of_another_model_is_refused_by_field(llama: PreTrainedModel, field: str, value: object) -> None:
    with pytest.raises(ffnskip.ProfileError, match=f"model.{field} is {value} in the profile .org/pico. and "):
        ffnskip.apply(llama, pico_profile(llama, **{field: value}))


@pytest.mark.parametrize("check", [True, False])
def test_a_second_profile_is_refused_and_leaves_the_first_alone(llama: PreTrainedModel, check: bool) -> None:
    with ffnskip.apply(llama, pico_profile(llama, cold_s=1, cold_e=3, threshold=-1.0), mode="score") as first:
        with pytest.raises(ffnskip.FfnskipError, match=r"already has a profile on: take it off with remove\(\)"):
            ffnskip.apply(llama, pico_profile(llama, cold_s=3, cold_e=5), check=check)
        assert first.stats.tokens == 0
        logits(llama)
        assert first.stats.skipped == [0, 0, 20, 0, 0, 0]


def test_a_profile_may_come_from_a_file_with_another_threshold(llama: PreTrainedModel, tmp_path: Path) -> None:
    profile = pico_profile(llama, threshold=0.5)
    save_profile(profile, tmp_path / "p.yaml")
    with ffnskip.apply(llama, tmp_path / "p.yaml", threshold=0.75) as applied:
        assert applied.profile.skip == profile.skip.model_copy(update={"threshold": 0.75})
    with ffnskip.apply(llama, str(tmp_path / "p.yaml")) as applied:
        assert applied.profile == profile


def test_a_profile_can_be_moved_along_its_curve(llama: PreTrainedModel) -> None:
    """The curve is measured here: between its points the model skips more than at one, less than at the other."""
    similarities = dense_similarities(llama, TEXT)[:, 1:4]
    profile = pico_profile(llama)
    measured = []
    for threshold in (float(similarities.quantile(share)) for share in (0.9, 0.1)):
        with ffnskip.apply(llama, profile, mode="score", threshold=threshold) as applied:
            logits(llama)
        measured.append(CurvePoint(threshold, applied.stats.skip_ratio, 0.0))
    less, more = measured
    profile = pico_profile(llama, curve=measured)
    target = (less.skip_ratio + more.skip_ratio) / 2
    with ffnskip.apply(llama, profile, mode="score", target=target) as applied:
        logits(llama)
    assert applied.profile == profile.at_ratio(target)
    assert less.skip_ratio < applied.stats.skip_ratio < more.skip_ratio


def test_mode_can_change_between_passes_and_counts_can_start_anew(llama: PreTrainedModel) -> None:
    with ffnskip.apply(llama, pico_profile(llama, threshold=-1.0)) as applied:
        logits(llama)
        assert applied.stats.tokens == 0
        applied.mode = "score"
        logits(llama)
        assert applied.stats.tokens == 20
        applied.reset_stats()
        assert applied.stats.tokens == sum(applied.stats.skipped) == 0


Sabotage = Callable[[PreTrainedModel], None]


def adding(added: Callable[[nn.Module, Tensor], Tensor]) -> Sabotage:
    """Layer 2 of a Llama model adds something else than its FFN's output."""

    def rewire(model: PreTrainedModel) -> None:
        layer: Any = ffn_sites(model)[2].layer

        def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            attended, _ = layer.self_attn(layer.input_layernorm(hidden_states), **kwargs)
            h = hidden_states + attended
            return h + added(layer.mlp, layer.post_attention_layernorm(h))

        layer.forward = forward

    return rewire


def bypass_the_module(model: PreTrainedModel) -> None:
    forward = ffn_sites(model)[2].ffn.forward
    adding(lambda _, x: forward(x))(model)


def remember_the_output(model: PreTrainedModel) -> None:
    remembered: list[Tensor] = []

    def added(ffn: nn.Module, x: Tensor) -> Tensor:
        if len(remembered) < 2:  # passes of the self-check over the untouched model
            remembered.append(ffn(x))
        return remembered[-1]

    adding(added)(model)


class Shell(nn.Module):
    """Calls a decoder's forward past its hooks, which tell the rule where in the text it is."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body, self.embed_tokens = body, body.embed_tokens

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body.forward(*args, **kwargs)


def call_the_decoder_past_its_hooks(model: PreTrainedModel) -> None:
    model.model = Shell(model.model)


def rename_the_norms(model: PreTrainedModel) -> None:
    layer: Any = ffn_sites(model)[2].layer
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    del layer.input_layernorm, layer.post_attention_layernorm
    layer.first, layer.second = first, second

    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        h = hidden_states + layer.self_attn(first(hidden_states), **kwargs)[0]
        return h + layer.mlp(second(h))

    layer.forward = forward


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (adding(lambda ffn, x: torch.zeros_like(x)), "the model does not call the FFN of every layer"),
        (bypass_the_module, "the model does not call the FFN of every layer"),
        (remember_the_output, "the model does not call every wrapped FFN once per pass"),
        (adding(lambda ffn, x: ffn(ffn(x))), "the FFN of layer 2 is not run once per pass"),
        (adding(lambda ffn, x: ffn(x, x)), "The FFN of layer 2 is given more than its input"),
        (adding(lambda ffn, x: 0.5 * ffn(x)), "layer 2 does not add its FFN's output to the stream"),
        (adding(lambda ffn, x: ffn(x) + 1e-3 * torch.randn_like(x)), r"\(is it in eval mode\?\)"),
        (call_the_decoder_past_its_hooks, "the rule did not see every token in every layer"),
        (rename_the_norms, "layer 2 does not add its FFN's output to the stream"),
    ],
    ids=[
        "never-called",
        "bypassed",
        "remembered",
        "called-twice",
        "residual",
        "scaled",
        "random",
        "past-hooks",
        "norm",
    ],
)
def test_a_model_that_does_something_else_with_its_ffn_is_refused_and_left_as_it_was(
    llama: PreTrainedModel, sabotage: Sabotage, message: str
) -> None:
    sabotage(llama)
    modules = list(llama.modules())
    with pytest.raises(ffnskip.UnsupportedModelError, match=message):
        ffnskip.apply(llama, pico_profile(llama))
    assert list(llama.modules()) == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_model_saved_while_a_profile_is_on_is_complete(name: str, tmp_path: Path) -> None:
    model = pico_model(name)
    weights = model.state_dict()
    with ffnskip.apply(model, pico_profile(model)):
        assert model.state_dict().keys() == weights.keys()
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float16, False), (torch.bfloat16, False), (torch.float64, False), (torch.float32, True)],
)
def test_skipping_keeps_the_models_dtype_and_works_under_autocast(dtype: torch.dtype, autocast: bool) -> None:
    model = pico_model(dtype=dtype)
    profile = pico_profile(model, threshold=middle_threshold(model, TEXT))
    with ffnskip.apply(model, profile, mode="score") as applied, torch.autocast("cpu", torch.bfloat16, autocast):
        assert logits(model).dtype == (torch.bfloat16 if autocast else dtype)
    assert 0 < applied.stats.skip_ratio < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [({"threshold": 0.9, "target": 0.2}, "a threshold or a target, not both"), ({"mode": "typo"}, "decode, score")],
)
def test_options_that_mean_nothing_are_refused(llama: PreTrainedModel, options: Any, message: str) -> None:
    with pytest.raises(ffnskip.FfnskipError, match=message):
        ffnskip.apply(llama, pico_profile(llama), **options)
