"""Compiling the rule `price`: its constants predict the damage, and a goal in FLOPs is reached."""

from functools import cache

import pytest
import torch
from support import calibrations
from support.pico import N_LAYERS, pico_model, pico_tokens
from transformers import PreTrainedModel

from ffnskip.model.parts import parts_of
from ffnskip.profiles.profile import dump_profile
from ffnskip_cli.calibration.assemble import Calibrated
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.rules.price import record_prices, take_prices
from ffnskip_cli.calibration.settings import Goal, Settings
from ffnskip_cli.measure.quality import measure_quality
from ffnskip_cli.progress import silently

LENGTH = 24
TEXT, HELD_OUT = pico_tokens(LENGTH, batch=16), pico_tokens(LENGTH, batch=6, seed=1)
GOALS = (Goal("target_flops", 0.05), Goal("target_flops", 0.15), Goal("target_ratio", 0.3))


@cache
def llama() -> PreTrainedModel:
    return pico_model()


@cache
def compiled() -> list[Calibrated]:
    settings = Settings(GOALS, rule="price", tokens=TEXT.numel(), sequence_length=LENGTH, warm_up=3)
    calibration = calibrations.calibrated(llama(), TEXT, HELD_OUT, settings)
    assert not calibration.refused
    return calibration.finished


def test_the_constants_predict_what_leaving_out_costs() -> None:
    """KL against the sum of ``½ x² E[g²]`` over what is left out, at prices where the second order is enough."""
    profile = compiled()[0].profile
    prices = take_prices(Lab(llama()), TEXT, 4, seed=0)
    (quality,) = measure_quality(llama(), [profile], HELD_OUT, silently)
    worth = 0.0
    flops = {part.role: part for part in parts_of(llama().model.layers[0])}
    hooks = []
    for index, layer in enumerate(llama().model.layers):
        for part in parts_of(layer):
            c = prices[f"price.{part.role}"][index]

            def look(module: object, args: tuple[torch.Tensor], c: torch.Tensor = c, role: str = part.role) -> None:
                nonlocal worth
                price = args[0][0, 3:-1].square() * c
                worth += float(price[price < profile.skip.threshold].sum()) * flops[role].flops

            hooks.append(part.matrices[0].register_forward_pre_hook(look))
    with torch.inference_mode():
        for sequence in HELD_OUT:
            llama()(sequence[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    predicted = worth / quality.tokens
    assert predicted / 2 < quality.kl.mean < predicted * 2


@pytest.mark.parametrize("place", range(len(GOALS)))
def test_a_goal_is_reached_in_the_running_model(place: int) -> None:
    goal, found = GOALS[place], compiled()[place].profile
    (quality,) = measure_quality(llama(), [found], TEXT, silently)
    assert found.measured
    assert getattr(found.measured, goal.kind) == goal.value
    if goal.kind == "target_ratio":
        assert quality.skip_ratio.mean == pytest.approx(goal.value, abs=0.01)
    else:
        assert found.measured.flops_saved_past_warm_up == pytest.approx(goal.value, abs=0.03)  # on other text
        assert found.measured.flops_saved < (found.measured.flops_saved_past_warm_up or 0.0)
    assert 0 < (found.measured.least_skipped or 0.0) < found.measured.skip_ratio


def test_the_curve_moves_the_price_and_the_same_inputs_give_the_same_profile() -> None:
    profile = compiled()[1].profile
    ratios = [point.skip_ratio for point in profile.curve_by_ratio]
    assert ratios == sorted(ratios)
    moved = profile.at_ratio(0.2)
    assert moved.skip.threshold < profile.at_ratio(0.3).skip.threshold
    dump = dump_profile(profile)
    compiled.cache_clear()
    assert dump_profile(compiled()[1].profile) == dump


def test_recorded_quantiles_are_those_of_the_prices() -> None:
    prices = take_prices(Lab(llama()), TEXT[:4], 4, seed=0)
    record = record_prices(Lab(llama()), prices, TEXT[:2], prompt=3)
    assert record.values.shape == (2, LENGTH - 3, N_LAYERS, 48)
    assert bool((record.values.diff(dim=-1)[..., :31] >= 0).all())  # two thirds are the FFN's inputs, in rising order
