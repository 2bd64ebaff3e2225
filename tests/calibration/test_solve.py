"""The solved threshold against the rule simulated one step of a threshold to either side."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.factories import make_profile

from ffnskip import FfnskipError
from ffnskip.profiles.schema import Skip
from ffnskip_cli.calibration.recording.record import Record
from ffnskip_cli.calibration.threshold.solve import highest_ratio, simulated_ratio, solve_threshold

N_LAYERS = 6
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
