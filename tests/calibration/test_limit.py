"""Limits on quality: as much is skipped as stays within them on the calibration text, and then on the held-out one."""

from functools import cache
from typing import Any

import pytest
import torch
from support.calibrations import WARM_UP, calibrated, calibrated_on, paper_settings, quality_of
from support.factories import make_profile
from support.pico import N_LAYERS, float64_model, pico_profile, pico_tokens
from torch import Tensor
from transformers import PreTrainedModel

from ffnskip import FfnskipError, Profile, SkipStats
from ffnskip.decode import GeneralPath, generate_tokens
from ffnskip.profiles.schema import Skip
from ffnskip.sampling import Sampling
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.recording.record import Record, record_generated, record_text
from ffnskip_cli.calibration.settings import Goal
from ffnskip_cli.calibration.threshold import goals
from ffnskip_cli.calibration.threshold.goals import NEARLY
from ffnskip_cli.calibration.threshold.solve import Verified, highest_ratio, simulated_ratio
from ffnskip_cli.measure.quality import Estimate, Quality

LENGTH = 32


def model_of(ffn_scale: float = 1.0) -> PreTrainedModel:
    return float64_model("llama", *[ffn_scale**3] * N_LAYERS)


@cache
def written_text(sequences: int, seed: int = 0) -> Tensor:
    """Sampled from the model, which predicts it best: whatever is skipped raises its perplexity."""
    start = pico_tokens(1, batch=sequences, seed=seed)
    sampled = generate_tokens(
        GeneralPath(model_of()), start, max_new_tokens=LENGTH - 1, sampling=Sampling(temperature=1.0, seed=seed)
    )
    return torch.cat([start, torch.stack(list(sampled), dim=1)], dim=1)


@cache
def recorded(ffn_scale: float = 1.0) -> Record:
    return record_text(model_of(ffn_scale), written_text(40))


def rule(**options: int | None) -> Profile:
    return pico_profile(model_of(), **{"warm_up": WARM_UP, "cold_s": 1, "cold_e": 5, **options})


def found_within(
    goal: Goal, profile: Profile | None = None, ffn_scale: float = 1.0, record: Record | None = None
) -> Verified:
    record = recorded(ffn_scale) if record is None else record
    profile = rule() if profile is None else profile
    return goals.largest_within(Lab(model_of(ffn_scale)), profile, record, goal, goal.value)


def quality_at(profile: Profile, tokens: Tensor, ffn_scale: float = 1.0) -> Quality:
    return quality_of(model_of(ffn_scale), profile, tokens)


@pytest.mark.parametrize("ffn_scale", [1.0, 2.0])
@pytest.mark.parametrize("goal", [Goal("max_kl", 0.01), Goal("max_kl", 0.1), Goal("max_perplexity_increase", 0.02)])
def test_the_cost_on_the_calibration_text_ends_just_below_the_limit(goal: Goal, ffn_scale: float) -> None:
    found = found_within(goal, ffn_scale=ffn_scale)
    quality = quality_at(rule().with_threshold(found.threshold), written_text(40), ffn_scale)
    assert NEARLY * goal.value <= goal.cost(quality) <= goal.value
    assert found.ratio == quality.skip_ratio.mean > 0


@pytest.mark.parametrize("power", [1, 2, 3, 4])
@pytest.mark.parametrize("allowed", [0.02, 0.1, 0.5, 2.0, 8.0])
def test_the_limit_is_met_however_steep_the_cost(monkeypatch: pytest.MonkeyPatch, power: int, allowed: float) -> None:
    """Costs that are 1 at a ratio of 0.1, where the search for a limit begins, and grow as a power of the ratio."""
    record = Record(torch.zeros(50, 200), torch.rand(50, 200, 10, generator=torch.Generator().manual_seed(0)))
    profile = make_profile(n_layers=10, cold_s=0, cold_e=10, warm_up=0)

    def cost(skip: Skip) -> float:
        return (simulated_ratio(record, skip) / 0.1) ** power

    def measure(model: object, profiles: list[Profile], *args: object, **options: object) -> list[Quality]:
        zero, skip = Estimate(0.0, 0.0), profiles[0].skip
        kl, ratio = Estimate(cost(skip), 0.0), Estimate(simulated_ratio(record, skip), 0.0)
        return [Quality(50, 10_000, zero, zero, kl, zero, ratio, SkipStats(10), ())]

    monkeypatch.setattr(Lab, "quality", measure)
    found = found_within(Goal("max_kl", allowed), profile, record=record)
    assert NEARLY * allowed <= cost(profile.with_threshold(found.threshold).skip) <= allowed


def test_a_limit_beyond_all_costs_takes_the_whole_region() -> None:
    found = found_within(Goal("max_kl", 50.0))
    assert found.ratio == pytest.approx(highest_ratio(recorded(), rule().skip), rel=1e-12)


def test_the_prompts_of_generated_text_do_not_count() -> None:
    record, goal = record_generated(model_of(), written_text(12)[:, :9], 20), Goal("max_kl", 0.05)
    found = found_within(goal, record=record)
    behind_prompts = rule(warm_up=9 + WARM_UP).with_threshold(found.threshold)
    quality = quality_at(behind_prompts, record.sequences)
    assert 0.8 * goal.value <= quality.kl.mean <= goal.value
    assert found.ratio == quality.skip_ratio.mean


@pytest.mark.parametrize(
    ("limit", "region", "words"),
    [
        (1e-9, (1, 5), r"No threshold [^\n]+ a KL of at most 1e-09 on the calibration text"),
        (0.1, (3, 4), r"Nothing can be skipped from layer 3 to 3: [^\n]+ --cold-e "),
    ],
)
def test_what_has_no_solution_is_refused(limit: float, region: tuple[int, int], words: str) -> None:
    with pytest.raises(FfnskipError, match=rf"^{words}[^\n]*\.$"):
        found_within(Goal("max_kl", limit), rule(cold_s=region[0], cold_e=region[1]))


@pytest.mark.parametrize("kind", ["max_kl", "max_perplexity_increase"])
def test_no_profile_costs_more_on_held_out_text_than_was_allowed(kind: Any) -> None:
    goals = tuple(Goal(kind, limit) for limit in (0.03, 0.06, 0.12))
    finished = calibrated_on(model_of(), written_text(40), written_text(24, seed=1), *goals)
    for goal, found in zip(goals, finished, strict=True):
        measured = found.profile.measured
        cost = measured.kl if kind == "max_kl" else measured.perplexity / measured.perplexity_dense - 1
        assert 0.5 * goal.value <= cost <= goal.value
        assert getattr(measured, kind) == goal.value


def test_the_limit_is_tightened_where_held_out_text_costs_more() -> None:
    """As here, where all that was calibrated on are single tokens repeated."""
    text, held_out = pico_tokens(1, batch=40).expand(-1, LENGTH).contiguous(), written_text(24, seed=1)
    goal = Goal("max_kl", 0.1)
    (found,) = calibrated_on(model_of(), text, held_out, goal, cold_s=1, cold_e=5)
    on_calibration_text_alone = found_within(goal, record=record_text(model_of(), text))
    loose, tight = (
        quality_at(rule().with_threshold(threshold), held_out).kl.mean
        for threshold in (on_calibration_text_alone.threshold, found.profile.skip.threshold)
    )
    assert tight <= goal.value < loose


def test_a_limit_that_cannot_be_kept_does_not_cost_the_others() -> None:
    goals = (Goal("max_kl", 1e-9), Goal("max_kl", 0.1))
    settings = paper_settings(*goals, tokens=40 * LENGTH, sequence_length=LENGTH, warm_up=WARM_UP, candidates=2)
    result = calibrated(model_of(), written_text(40), written_text(24, seed=1), settings)
    assert [found.goal for found in result.finished] == [goals[1]]
    (refusal,) = result.refused
    assert "1e-09" in refusal


def test_rules_can_be_compared_at_the_most_that_the_region_allows() -> None:
    """The mean of that ratio over these twelve sequences is rounded, and comes out a little above it."""
    text, goal = written_text(40)[:12], Goal("max_kl", 50.0)
    most = highest_ratio(record_text(model_of(), text), rule(refresh_every=6).skip)
    assert float(torch.tensor([most] * 12, dtype=torch.float64).mean()) > most
    choices = {"cold_s": 1, "cold_e": 5, "refresh_every": 6, "candidates": 1}
    assert calibrated_on(model_of(), text, written_text(24, seed=1), goal, **choices)
