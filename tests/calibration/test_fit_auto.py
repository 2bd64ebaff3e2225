"""`--compensate auto`: every candidate from the same sums, and the one that saves most is taken."""

import pytest
from support.pico import HIDDEN, N_LAYERS, pico_model, pico_profile, pico_tokens

from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Compensation
from ffnskip_cli.calibration.fit.auto import candidates, choose_compensation
from ffnskip_cli.calibration.fit.fitter import FitTask
from ffnskip_cli.calibration.lab import Lab

TEXT, HELD_BACK = pico_tokens(32, batch=48), pico_tokens(32, batch=8, seed=2)
RATIO = 0.25


def draft(cold_s: int = 0, cold_e: int = N_LAYERS) -> Profile:
    return pico_profile(pico_model(), rule="predicted-damage", threshold=0.0, cold_s=cold_s, cold_e=cold_e, warm_up=4)


def test_the_one_that_saves_most_is_taken_and_all_are_told() -> None:
    model = pico_model()
    chosen, tried, gradients = choose_compensation(Lab(model), FitTask(draft(), TEXT, HELD_BACK, RATIO, 0), 0.02)
    assert [(one.kind, one.rank, one.neurons) for one in tried] == [
        (one.kind, one.rank, one.neurons) for one in candidates(model)
    ]
    best = max(tried, key=lambda one: one.flops_saved)
    assert (chosen.kind, chosen.rank, chosen.neurons) == (best.kind, best.rank, best.neurons)
    assert tried[-1].skip_ratio > tried[0].skip_ratio  # a whole map with neurons does less harm than the mean
    assert gradients.fisher.shape == (N_LAYERS, HIDDEN, HIDDEN)


def test_no_candidate_claims_more_than_the_region_holds() -> None:
    _, tried, _ = choose_compensation(Lab(pico_model()), FitTask(draft(2, 4), TEXT, HELD_BACK, RATIO, 0), 10.0)
    assert max(one.skip_ratio for one in tried) == pytest.approx(2 / N_LAYERS, abs=1e-3)


def test_neurons_are_left_out_where_they_cannot_be_told_apart() -> None:
    assert all(one.neurons == 0 for one in candidates(pico_model("gpt2")))
    assert Compensation(kind="mean") in candidates(pico_model("gpt2"))
