"""What is seen of the running model: the very states of its FFNs, and what its probes say of them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from support.factories import make_compensated
from support.pico import HIDDEN, N_LAYERS, float64_model, middle_threshold, pico_profile, pico_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

import ffnskip
from ffnskip.general.skippable import skippable
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.profile import Profile
from ffnskip.rules.predicted_damage import PROBE, PROBE_BIAS
from ffnskip_cli.calibration.fit.trial import Seen, observe, record_scores
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.threshold.solve import measure_ratio, simulated_ratio, solve_threshold

TEXT, WARM_UP = pico_tokens(14, batch=6), 3  # more sequences than one batch has
REGION = range(1, 5)


def llama() -> PreTrainedModel:
    return float64_model()


def profile_of(rule: str, threshold: float, name: str = "llama") -> Profile:
    info = pico_profile(float64_model(name)).model.model_dump()
    choices = {"rule": rule, "rank": 3, "threshold": threshold, "warm_up": WARM_UP}
    return make_compensated("low-rank", **info | choices)


def seen_by_run(profile: Profile, name: str = "llama") -> dict[int, list[Seen]]:
    found: dict[int, list[Seen]] = {place: [] for place in range(len(REGION))}
    observe(Lab(float64_model(name)), profile, TEXT, lambda seen: found[seen.place].append(seen), "looking")
    return found


@contextmanager
def watched(name: str = "llama") -> Iterator[dict[int, list[tuple[Tensor, Tensor]]]]:
    """Inputs and outputs of the FFN modules of the region, whatever they are, by layer."""
    found: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in REGION}
    sites = ffn_sites(float64_model(name))

    def keep(layer: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found[layer].append((args[0], output))

    hooks = [sites[layer].ffn.register_forward_hook(partial(keep, layer)) for layer in REGION]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def dense_states() -> dict[int, list[tuple[Tensor, Tensor]]]:
    with watched() as found:
        for batch in TEXT.split(4):
            llama()(batch, use_cache=False)
    return found


@pytest.mark.parametrize(("rule", "never"), [("cosine", 2.0), ("predicted-damage", 0.0)])
def test_a_profile_that_never_skips_shows_the_states_of_the_untouched_model(rule: str, never: float) -> None:
    shown = seen_by_run(profile_of(rule, never))
    found = dense_states()
    for place, layer in enumerate(REGION):
        for seen, (x, f) in zip(shown[place], found[layer], strict=True):
            assert torch.equal(seen.x, x[:, WARM_UP:].flatten(0, 1))
            assert torch.equal(seen.f, f[:, WARM_UP:].flatten(0, 1))
            assert not seen.skipped.any()


@torch.inference_mode()
@pytest.mark.parametrize("rule", ["cosine", "predicted-damage"])
def test_skipped_tokens_show_what_the_ffn_would_have_given_and_the_model_goes_on_with_the_rest(rule: str) -> None:
    threshold = 1.0 if rule == "predicted-damage" else middle_threshold(llama(), TEXT)
    profile = profile_of(rule, threshold)
    shown = seen_by_run(profile)
    sites = ffn_sites(llama())
    with ffnskip.apply(llama(), profile, mode="score") as applied, watched() as found:
        for batch in TEXT.split(4):
            llama()(batch, use_cache=False)
    total = 0
    for place, layer in enumerate(REGION):
        ffn = sites[layer].ffn
        for seen, (x, output) in zip(shown[place], found[layer], strict=True):
            own, added = x[:, WARM_UP:].flatten(0, 1), output[:, WARM_UP:].flatten(0, 1)
            assert torch.equal(seen.x, own)  # so nothing was changed by looking
            assert torch.allclose(seen.f, ffn(own), rtol=1e-9, atol=1e-12)
            skipped = seen.skipped
            assert torch.allclose(added[skipped], seen.compensator.added(own)[skipped], rtol=1e-9, atol=1e-12)
            assert torch.equal(added[~skipped], seen.f[~skipped])
            total += int(skipped.sum())
    assert total == sum(applied.stats.skipped) > 0
    assert total < len(REGION) * TEXT[:, WARM_UP:].numel()


@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_behind_a_norm_or_a_multiplier_f_is_what_the_wrapped_ffn_returns(name: str) -> None:
    profile = profile_of("predicted-damage", 1.0, name)
    shown = seen_by_run(profile, name)
    assert any(bool(seen.skipped.any()) for seen in shown[0])
    for place, layer in enumerate(REGION):
        site = ffn_sites(float64_model(name))[layer]
        norm_after = site.norm_after
        for seen in shown[place]:
            with torch.inference_mode():
                expected = site.ffn(seen.x)
                expected = expected if norm_after is None else norm_after(expected)
            assert torch.allclose(seen.f, expected, rtol=1e-9, atol=1e-12)


def test_the_model_is_restored_even_when_looking_fails() -> None:
    def fail(seen: Seen) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observe(Lab(llama()), profile_of("predicted-damage", 1.0), TEXT, fail, "looking")
    assert not any(skippable(module) for module in llama().modules())


@pytest.mark.parametrize("prompt", [0, 4])
def test_scores_lie_where_their_tokens_and_layers_are(prompt: int) -> None:
    profile = profile_of("predicted-damage", 0.0)  # never skips, so that the inputs are those of the dense model
    record = record_scores(Lab(llama()), profile, TEXT, prompt)
    assert record.values.shape == (len(TEXT), TEXT.shape[1] - prompt, N_LAYERS)
    assert record.prompt_tokens == prompt
    assert torch.equal(record.sequences, TEXT)
    assert bool((record.values[:, :WARM_UP] == math.inf).all())
    cold = [layer for layer in range(N_LAYERS) if layer not in REGION]
    assert bool((record.values[:, :, cold] == math.inf).all())
    found = dense_states()
    for place, layer in enumerate(REGION):
        x = torch.cat([some for some, _ in found[layer]])[:, prompt + WARM_UP :]
        probe, bias = (profile.weights.tensors[name][place].double() for name in (PROBE, PROBE_BIAS))
        expected = x @ probe + bias
        assert torch.allclose(record.values[:, WARM_UP:, layer].double(), expected, rtol=1e-5, atol=1e-5)
    assert x.shape[2] == HIDDEN


@pytest.mark.parametrize("prompt", [0, 4])
def test_the_ratio_simulated_on_scores_is_that_of_the_running_model(prompt: int) -> None:
    start = profile_of("predicted-damage", 0.5)
    record = record_scores(Lab(llama()), start, TEXT, prompt)
    # At the threshold that it was recorded at, every score is the very one that the running model decides by.
    assert simulated_ratio(record, start.skip) == measure_ratio(Lab(llama()), start, record)
    for ratio in (0.2, 0.4):
        threshold = solve_threshold(record, start.skip, ratio)
        measured = measure_ratio(Lab(llama()), start.with_threshold(threshold), record)
        assert measured == pytest.approx(ratio, abs=0.04)
