"""The cold regions of real similarity curves, of ones as smooth as the paper's, and of curves that have no plateau."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffnskip import FfnskipError
from ffnskip_cli.calibration.rules.cosine.compiler import Region, find_region

CURVES = {
    "smollm2-135m": (
        "0.062 0.962 0.968 0.971 0.966 0.967 0.967 0.967 0.966 0.970 0.968 0.976 0.978 0.980 0.979 "
        "0.979 0.983 0.983 0.970 0.973 0.956 0.971 0.962 0.948 0.965 0.974 0.972 0.968 0.963 0.767",
        Region(2, 28),
    ),
    "gemma-3-270m": (
        "0.77 0.99 0.99 0.94 0.97 0.97 0.98 0.96 0.99 0.99 0.99 0.97 0.97 0.98 0.98 0.98 0.99 0.98",
        Region(5, 17),
    ),
    "monotone-ends": (
        "0.50 0.75 0.87 0.93 0.955 0.965 0.97 0.975 0.98 0.98 0.98 0.975 0.97 0.96 0.92 0.85 0.70",
        Region(4, 14),
    ),
    "flat": ("0.98 " * 8, Region(1, 7)),
}


def curve(name: str) -> torch.Tensor:
    return torch.tensor([float(value) for value in CURVES[name][0].split()])


@pytest.mark.parametrize("name", CURVES)
def test_the_region_lies_between_the_steep_ends(name: str) -> None:
    assert find_region(curve(name)) == CURVES[name][1]


@given(name=st.sampled_from(["smollm2-135m", "gemma-3-270m", "monotone-ends"]), data=st.data())
def test_a_little_noise_does_not_move_the_region(name: str, data: st.DataObject) -> None:
    values = curve(name)
    noise = data.draw(st.lists(st.floats(-1e-3, 1e-3), min_size=len(values), max_size=len(values)))
    assert find_region(values + torch.tensor(noise)) == CURVES[name][1]


@pytest.mark.parametrize(
    "values", [[0.9], [0.9, 0.9, 0.9], [0.5, 0.98, 0.98, 0.98, 0.5], [0.98, 0.98, 0.5, 0.5, 0.98, 0.98]]
)
def test_without_a_plateau_the_user_is_asked(values: list[float]) -> None:
    with pytest.raises(FfnskipError, match=r"^[^\n]+ no plateau [^\n]+ --cold-s and --cold-e\.$"):
        find_region(torch.tensor(values))
