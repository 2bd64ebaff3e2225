"""The closed loop: what the corrected threshold really skips in the running model."""

from functools import cache

import pytest
import torch
from support.calibrations import ratio_by_apply
from support.pico import N_LAYERS, float64_model, pico_profile, pico_tokens

from ffnskip import FfnskipError, Profile
from ffnskip.model.sites import ffn_sites
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.recording.record import Record, record_generated, record_text
from ffnskip_cli.calibration.threshold.solve import highest_ratio, simulated_ratio, solve_threshold
from ffnskip_cli.calibration.threshold.verify import GOOD_ENOUGH, measure_ratio, verify

TEXT = pico_tokens(40, batch=10)


@cache
def recorded(name: str) -> Record:
    return record_text(float64_model(name), TEXT)


def profile_of(name: str, **options: int) -> Profile:
    return pico_profile(float64_model(name), **{"cold_s": 0, "cold_e": N_LAYERS, **options})


def test_the_ratio_that_is_reported_is_the_running_models() -> None:
    model, profile = float64_model("llama"), profile_of("llama", cold_s=1, cold_e=5, warm_up=3)
    found = verify(Lab(model), profile, recorded("llama"), 0.2)
    assert found.ratio == pytest.approx(0.2, abs=GOOD_ENOUGH)
    assert found.ratio == ratio_by_apply(model, profile.with_threshold(found.threshold), TEXT)


@pytest.mark.parametrize("target", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("name", ["gpt2", "phi"])
def test_the_threshold_is_corrected_where_the_simulation_is_far_off(name: str, target: float) -> None:
    profile = profile_of(name, window=1)
    found = verify(Lab(float64_model(name)), profile, recorded(name), target)
    assert found.ratio == pytest.approx(target, abs=0.01)
    assert found.ratio == ratio_by_apply(float64_model(name), profile.with_threshold(found.threshold), TEXT)


def test_there_is_something_to_correct() -> None:
    """Else the test above proves nothing: where skipping turns later layers more, the simulation's threshold misses."""
    profile, record = profile_of("gpt2", window=1), recorded("gpt2")
    simulated = profile.with_threshold(solve_threshold(record, profile.skip, 0.25))
    assert simulated_ratio(record, simulated.skip) == pytest.approx(0.25, abs=0.002)
    assert measure_ratio(Lab(float64_model("gpt2")), simulated, record) < 0.25 - 0.04


@pytest.mark.parametrize("window", [1, 2])
def test_every_ratio_up_to_nearly_the_highest_is_found(window: int) -> None:
    """Corrections as large as the miss swing to and fro for ever where the running model answers twice as strongly."""
    profile, record = profile_of("gpt2", window=window), recorded("gpt2")
    most = highest_ratio(record, profile.skip)
    found = [
        verify(Lab(float64_model("gpt2")), profile, record, share * most).ratio for share in (0.3, 0.5, 0.6, 0.7, 0.9)
    ]
    assert found == pytest.approx([share * most for share in (0.3, 0.5, 0.6, 0.7, 0.9)], abs=0.01)


def test_prompts_of_generated_records_are_dense_and_warm_up_comes_behind_them() -> None:
    model = float64_model("llama")
    record, modules = record_generated(model, TEXT[:4, :7], 10), list(model.modules())
    profile = profile_of("llama", cold_s=1, cold_e=5, warm_up=3, threshold=-1.0)
    ran: list[int] = []
    ffn = ffn_sites(model)[2].layer.get_submodule("mlp")
    hook = ffn.register_forward_pre_hook(lambda module, args: ran.append(args[0].shape[1]))
    ratio = measure_ratio(Lab(model), profile, record)
    hook.remove()
    assert ran == [7 + 3] * 4
    assert ratio == 3 / 6
    assert list(model.modules()) == modules


def test_a_ratio_beyond_the_region_or_that_no_threshold_gives_is_refused_in_one_sentence() -> None:
    """All tokens are equal here, so that they skip together and every ratio is a multiple of 1 / 6."""
    model, profile = float64_model("llama"), profile_of("llama")
    record = record_text(model, torch.full((2, 20), 7))
    assert verify(Lab(model), profile, record, 2 / 6).ratio == 2 / 6
    with pytest.raises(FfnskipError, match=r"^A skip ratio of 0\.25 cannot be [^\n]+ gives 0\.(167|333) [^\n]+\.$"):
        verify(Lab(model), profile, record, 0.25)
    with pytest.raises(FfnskipError, match=r"^A skip ratio of 0\.6 cannot be reached: layers 1 to 4 [^\n]+\.$"):
        verify(Lab(model), profile_of("llama", cold_s=1, cold_e=5), recorded("llama"), 0.6)
