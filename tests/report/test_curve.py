"""Moving along a profile's curve: another skip_ratio without a new calibration, and never beyond what was measured."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.factories import make_compensated, make_profile

from ffnskip.errors import FfnskipError
from ffnskip.profiles.evidence import CurvePoint
from ffnskip.profiles.profile import Profile

POINTS = (CurvePoint(0.99, 0.05, 0.01), CurvePoint(0.97, 0.25, 0.11), CurvePoint(0.96, 0.3, 0.51))

ratios = st.floats(0, 1)
thresholds = st.floats(-1, 1)


def on(*curve: CurvePoint) -> Profile:
    return make_profile(curve=curve)


@st.composite
def falling_curves(draw: st.DrawFn) -> list[CurvePoint]:
    """Curves as calibration makes them: the lower the threshold, the more is skipped; in any order, ties allowed."""
    size = draw(st.integers(2, 6))
    across = sorted(draw(st.lists(ratios, min_size=size, max_size=size)))
    down = sorted(draw(st.lists(thresholds, min_size=size, max_size=size)), reverse=True)
    points = [CurvePoint(threshold, ratio, 0.0) for threshold, ratio in zip(down, across, strict=True)]
    return draw(st.permutations(points))


def test_the_curve_has_its_own_points_is_linear_between_neighbours_and_moves_the_threshold_alone() -> None:
    profile = on(*POINTS)
    for point in POINTS:
        assert profile.point_at(point.skip_ratio) == point
        assert profile.at_ratio(point.skip_ratio).skip.threshold == point.threshold
    threshold, ratio, kl = profile.point_at(0.15)
    assert (threshold, ratio, kl) == (pytest.approx(0.98), 0.15, pytest.approx(0.06))
    assert profile.point_at(0.26).kl == pytest.approx(0.19)
    assert profile.point_at(0.2) == on(POINTS[1], POINTS[2], POINTS[0]).point_at(0.2)
    assert profile.at_ratio(0.2).with_threshold(profile.skip.threshold) == profile


@given(falling_curves(), ratios, ratios)
def test_a_higher_ratio_never_has_a_higher_threshold(curve: list[CurvePoint], one: float, other: float) -> None:
    first, last = min(point.skip_ratio for point in curve), max(point.skip_ratio for point in curve)
    low, high = sorted(min(max(ratio, first), last) for ratio in (one, other))
    profile = on(*curve)
    assert profile.at_ratio(high).skip.threshold <= profile.at_ratio(low).skip.threshold + 1e-12
    within = [point.threshold for point in curve]
    assert min(within) - 1e-12 <= profile.at_ratio(low).skip.threshold <= max(within) + 1e-12


def test_of_points_with_one_ratio_the_threshold_that_skips_less_is_taken() -> None:
    low, high = CurvePoint(0.9, 0.2, 0.3), CurvePoint(0.95, 0.2, 0.2)
    assert on(low, high).point_at(0.2) == on(high, low).point_at(0.2) == high
    before, behind = CurvePoint(0.99, 0.1, 0.1), CurvePoint(0.8, 0.3, 0.4)
    around = on(before, low, high, behind)
    assert around.point_at(0.15).threshold == pytest.approx((0.99 + 0.95) / 2)
    assert around.point_at(0.25).threshold == pytest.approx((0.9 + 0.8) / 2)


def test_under_predicted_damage_a_higher_ratio_has_a_higher_threshold() -> None:
    curve = [(0.1, 0.3, 1.0), (0.04, 0.2, 0.3), (0.02, 0.2, 0.2), (0.01, 0.1, 0.1)]
    profile = make_compensated("mean", rule="predicted-damage", threshold=0.01, curve=curve)
    moved = [profile.at_ratio(ratio).skip.threshold for ratio in (0.1, 0.15, 0.2, 0.25)]
    assert moved == pytest.approx([0.01, 0.015, 0.02, 0.07])
    assert profile.at_ratio(0.25).weights == profile.weights
    with pytest.raises(FfnskipError, match=r"^The threshold of predicted-damage is a number of nats and not -1"):
        profile.moved(threshold=-1.0)


OUTSIDE, NOT_FINITE = (0.0, 0.0499, 0.3001, 1.0, -0.1, 5), (math.nan, math.inf, -math.inf)
RANGE = "The profile's curve goes from ratio 0.05 to 0.3, not to"


@pytest.mark.parametrize(
    ("curve", "ratio", "sentence"),
    [
        *((POINTS, ratio, f"^{RANGE} {ratio}: calibrate for that target instead.$") for ratio in OUTSIDE),
        *((POINTS, ratio, f"^The target ratio must be a finite number, not {ratio}.$") for ratio in NOT_FINITE),
        *((POINTS[:size], 0.05, r"fewer than two points[^\n]*calibrate for that target instead\.$") for size in (0, 1)),
    ],
)
def test_nothing_is_extrapolated(curve: tuple[CurvePoint, ...], ratio: float, sentence: str) -> None:
    with pytest.raises(FfnskipError, match=sentence):
        on(*curve).at_ratio(ratio)


def test_a_profile_moves_by_a_threshold_or_a_target_or_not_at_all() -> None:
    profile = on(*POINTS)
    assert profile.moved() == profile
    assert profile.moved(threshold=0.0) == profile.with_threshold(0.0)
    assert profile.moved(target=0.2) == profile.at_ratio(0.2)
    with pytest.raises(FfnskipError, match=r"^Give a threshold or a target, not both\.$"):
        profile.moved(threshold=0.0, target=0.2)
