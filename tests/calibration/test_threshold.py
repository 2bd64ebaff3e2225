"""The solved threshold against the simulated rule, and what the corrected one really skips in the running model."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.calibrations import ratio_by_apply
from support.factories import make_profile
from support.pico import N_LAYERS, float64_model, pico_profile, pico_tokens

from ffnskip import FfnskipError, Profile
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.schema import Skip
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.recording.record import Record, record_generated, record_text
from ffnskip_cli.calibration.threshold.solve import (
    GOOD_ENOUGH,
    highest_ratio,
    measure_ratio,
    simulated_ratio,
    solve_threshold,
    verify,
)

STEP = 1e-6


@st.composite
def records(draw: st.DrawFn) -> Record:
    """Similarities crowded below 1 as real ones are, or on a coarse grid where many are equal."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 4)), draw(st.integers(5, 20)), N_LAYERS)
    turn = torch.rand(shape, generator=generator) ** draw(st.integers(1, 6)) * 2
    if draw(st.booleans()):
        turn = (4 * turn).round() / 4
    return Record(torch.zeros(shape[:2], dtype=torch.long), 1 - turn)


@st.composite
def skips(draw: st.DrawFn, window: st.SearchStrategy[int | None]) -> Skip:
    cold_s = draw(st.integers(0, N_LAYERS - 2))
    return make_profile(
        cold_s=cold_s,
        cold_e=draw(st.integers(cold_s + 2, N_LAYERS)),
        warm_up=draw(st.integers(0, 3)),
        window=draw(window),
        refresh_every=draw(st.none() | st.integers(2, 4)),
    ).skip


def ratio_at(record: Record, skip: Skip, threshold: float) -> float:
    return simulated_ratio(record, skip.model_copy(update={"threshold": threshold}))


shares = st.floats(0.01, 1.0)  # of the highest ratio


@settings(deadline=None)
@given(record=records(), skip=skips(st.none() | st.integers(1, 4)), share=shares)
def test_the_target_is_reached_and_one_step_higher_it_is_not(record: Record, skip: Skip, share: float) -> None:
    target = share * highest_ratio(record, skip)
    threshold = solve_threshold(record, skip, target)
    assert threshold == round(threshold, 6)
    assert ratio_at(record, skip, threshold) >= target > ratio_at(record, skip, threshold + STEP)


def same_everywhere(similarity: float, tokens: int) -> Record:
    return Record(torch.zeros(1, tokens, dtype=torch.long), torch.full((1, tokens, N_LAYERS), similarity))


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 3 / 6),
        ({"window": 1}, 2 / 6),
        ({"window": 2}, 2 / 6),
        ({"refresh_every": 2}, 3 / 6 * 4 / 8),
        ({"refresh_every": 3, "window": 1}, 2 / 6 * 6 / 8),
        ({"warm_up": 4, "refresh_every": 3}, 3 / 6 * 4 / 6),
    ],
)
def test_window_and_refresh_every_bound_what_can_be_skipped(options: dict[str, int], most: float) -> None:
    skip = make_profile(cold_s=1, cold_e=5, **{"warm_up": 2, **options}).skip
    record = same_everywhere(0.75, tokens=10)
    assert highest_ratio(record, skip) == pytest.approx(most)
    assert solve_threshold(record, skip, most / 2) == 0.75
    with pytest.raises(FfnskipError, match=rf"^[^\n]+ cannot be reached: layers 1 to 4 allow at most {most:.3f}, "):
        solve_threshold(record, skip, most + 0.001)


def test_tokens_of_the_warm_up_do_not_count() -> None:
    skip = make_profile(cold_s=1, cold_e=5, warm_up=2).skip
    similarities = torch.full((1, 4, N_LAYERS), 0.5)
    similarities[0, :2] = 0.9
    record = Record(torch.zeros(1, 4, dtype=torch.long), similarities)
    assert ratio_at(record, skip, 0.6) == 0
    assert solve_threshold(record, skip, 0.5) == 0.5


def test_a_region_of_one_layer_can_skip_nothing() -> None:
    with pytest.raises(FfnskipError, match=r"allow at most 0\.000"):
        solve_threshold(same_everywhere(1.0, tokens=5), make_profile(cold_s=2, cold_e=3).skip, 0.01)


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
    ffn = ffn_sites(model)[2].ffn
    hook = ffn.gate_proj.register_forward_pre_hook(lambda module, args: ran.append(args[0].shape[-2]))
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
