"""The choice of region, window and refresh: what is better beyond noise wins, within a budget, and pins stay."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
import torch
from support.calibrations import WARM_UP, calibrated_on, paper_settings, quality_of
from support.pico import N_LAYERS, float64_model, pico_profile, pico_tokens
from torch import Tensor
from transformers import PreTrainedModel

from ffnskip import FfnskipError, Profile
from ffnskip.profiles.profile import dump_profile
from ffnskip.profiles.schema import Skip
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.recording.record import Record, record_generated, record_text
from ffnskip_cli.calibration.rules.cosine import search as module
from ffnskip_cli.calibration.rules.cosine.search import Scored, Scorer, search
from ffnskip_cli.calibration.settings import Goal
from ffnskip_cli.calibration.threshold.solve import measure_ratio, solve_threshold
from ffnskip_cli.measure.quality import Quality

LENGTH = 32
TEXT = pico_tokens(LENGTH, batch=16)
GOAL = Goal("target_ratio", 0.2)
DEEP = 30  # layers of the model that the fake scorer pretends to have

Costs = Callable[[Skip], list[float]]


class FakeScorer:
    """Scores by a formula, on four sequences, and remembers what it was asked for."""

    def __init__(self, costs: Costs, ratio: Callable[[Skip], float] = lambda skip: 0.2) -> None:
        self.n_layers = DEEP
        self.asked: list[Skip] = []
        self._costs = costs
        self._ratio = ratio

    def score(self, skips: Iterable[Skip]) -> list[Scored]:
        skips = list(skips)
        self.asked += skips
        return [Scored(skip, self._ratio(skip), torch.tensor(self._costs(skip), dtype=torch.float64)) for skip in skips]


def start(**options: Any) -> Skip:
    return Skip.model_validate({"rule": "cosine", "cold_s": 5, "cold_e": 25, "threshold": 1.0, "warm_up": 3, **options})


def searched(scorer: FakeScorer, skip: Skip | None = None, **choices: Any) -> list[Scored]:
    sizes = {"sequence_length": LENGTH, "tokens": TEXT.numel(), "warm_up": WARM_UP}
    return search(cast(Scorer, scorer), start() if skip is None else skip, paper_settings(GOAL, **sizes, **choices))


def flat(cost: float) -> list[float]:
    return [cost, cost + 0.01, cost + 0.02, cost + 0.03]


def bowl(cold_s: int, cold_e: int) -> Costs:
    """The best region is this one."""
    return lambda skip: flat((skip.cold_s - cold_s) ** 2 + (skip.cold_e - cold_e) ** 2)


def without_threshold(skip: Skip) -> dict[str, Any]:
    return skip.model_dump(exclude={"threshold"})


def test_what_is_equal_within_noise_takes_nothing_from_the_papers_rule() -> None:
    """The others are better on three sequences of four, and on average, but not by two standard errors."""
    papers = flat(1.0)
    scorer = FakeScorer(lambda skip: papers if skip == start() else [0.9, 0.9, 0.9, 1.1])
    assert searched(scorer)[0].skip == start()
    assert {skip.window for skip in scorer.asked} == {None, 1, 2, 4}
    assert {skip.refresh_every for skip in scorer.asked} == {None, 6}
    assert len({(skip.cold_s, skip.cold_e) for skip in scorer.asked}) > 1
    assert searched(FakeScorer(lambda skip: papers))[0].skip == start()  # nor what costs exactly the same


def test_the_best_window_wins_and_stays_while_the_rest_is_sought() -> None:
    cost = {None: 4.0, 1: 3.0, 2: 1.0, 4: 2.0}
    scorer = FakeScorer(lambda skip: flat(cost[skip.window] - (skip.refresh_every is not None)))
    best = searched(scorer)[0].skip
    assert (best.window, best.refresh_every) == (2, 6)
    assert all(skip.window == 2 for skip in scorer.asked[4:])


@pytest.mark.parametrize(("cold_s", "cold_e"), [(9, 20), (0, DEEP), (5, 25), (13, 16), (22, 29)])
def test_a_planted_region_is_found(cold_s: int, cold_e: int) -> None:
    best = searched(FakeScorer(bowl(cold_s, cold_e)), candidates=80)[0].skip
    assert (best.cold_s, best.cold_e) == (cold_s, cold_e)


@pytest.mark.parametrize(
    "pins",
    [
        {"cold_s": 5},
        {"cold_e": 25},
        {"cold_s": 5, "cold_e": 25},
        {"window": 2},
        {"window": None, "refresh_every": None},
        {"refresh_every": 3},
    ],
)
def test_what_is_pinned_is_never_moved(pins: dict[str, Any]) -> None:
    scorer = FakeScorer(lambda skip: flat(100.0 - skip.cold_s - (skip.window or 9) + skip.cold_e))
    searched(scorer, start(**pins), **pins)
    for name in ("cold_s", "cold_e", "window", "refresh_every"):
        tried = {getattr(skip, name) for skip in scorer.asked}
        assert tried == {pins[name]} if name in pins else len(tried) > 1


def test_no_more_candidates_are_scored_than_allowed_and_none_twice() -> None:
    for candidates in range(1, 30):
        scorer = FakeScorer(bowl(12, 19))
        found = searched(scorer, candidates=candidates)
        tried = [tuple(without_threshold(skip).values()) for skip in scorer.asked]
        assert len(tried) == len(set(tried)) <= candidates
        assert len(tried) == candidates or found[0].skip == start(cold_s=12, cold_e=19)
        assert {tuple(without_threshold(scored.skip).values()) for scored in found} == set(tried)
        assert len(found) == len(tried)
        assert not any(other.beats(found[0]) for other in found)


@pytest.mark.parametrize("region", [(0, 2), (0, DEEP), (DEEP - 2, DEEP), (14, 16)])
def test_every_region_lies_in_the_model_and_has_room_for_a_trigger_and_a_skip(region: tuple[int, int]) -> None:
    for costs in (bowl(0, DEEP), bowl(14, 14)):
        scorer = FakeScorer(costs)
        searched(scorer, start(cold_s=region[0], cold_e=region[1]), candidates=60, window=None)
        assert all(skip.cold_s >= 0 and skip.cold_s + 2 <= skip.cold_e <= DEEP for skip in scorer.asked)


def test_windows_that_are_no_different_in_a_small_region_are_not_tried() -> None:
    for length, windows in {2: {None}, 3: {None, 1}, 5: {None, 1, 2}, 6: {None, 1, 2, 4}}.items():
        scorer = FakeScorer(lambda skip: flat(1.0))
        searched(scorer, start(cold_s=5, cold_e=5 + length), cold_s=5, cold_e=5 + length, refresh_every=None)
        assert {skip.window for skip in scorer.asked} == windows


def test_a_rule_that_hardly_skips_in_the_running_model_does_not_win_by_that() -> None:
    scorer = FakeScorer(
        lambda skip: [0.0] * 4 if skip.window == 1 else flat(1.0), lambda skip: 0.0 if skip.window == 1 else 0.2
    )
    assert searched(scorer)[0].skip == start()


@pytest.mark.parametrize(("gap", "wins"), [(0.017, False), (0.018, True)])
def test_better_beyond_noise_is_three_standard_errors_of_the_paired_difference(gap: float, wins: bool) -> None:
    """Differences of gap and gap + 0.02 in turn: a mean of gap + 0.01, and an error of 0.01 x sqrt(4/3) / 2 x 2."""
    one = torch.tensor([1.0, 5.0, 2.0, 9.0], dtype=torch.float64)
    other = one + gap - 0.01 + torch.tensor([0.0, 0.02, 0.0, 0.02], dtype=torch.float64)
    challenger, champion = (Scored(start(), 0.2, kl) for kl in (one, other))
    lead, error = challenger.lead_over(champion)
    assert lead == pytest.approx(gap)
    assert error == pytest.approx(0.02 / 12**0.5)
    assert challenger.beats(champion) == wins
    assert not champion.beats(challenger)


def rule(model: PreTrainedModel, **options: Any) -> Profile:
    return pico_profile(model, **{"warm_up": WARM_UP, "cold_s": 1, "cold_e": 5, **options})


def scorer_of(model: PreTrainedModel, record: Record, ratio: float) -> Scorer:
    return Scorer(Lab(model), rule(model), record, ratio)


def quality_at(model: PreTrainedModel, skip: Skip, tokens: Tensor) -> Quality:
    return quality_of(model, rule(model).model_copy(update={"skip": skip}), tokens)


def test_a_candidate_is_scored_by_its_kl_in_the_running_model_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEARCH_TOKENS", 9 * LENGTH)
    scorer = scorer_of(float64_model(), record_text(float64_model(), TEXT), 0.2)
    skips = [
        rule(float64_model(), **options).skip for options in ({}, {"window": 1}, {"refresh_every": 2}, {"cold_s": 2})
    ]
    scored = scorer.score(skips)
    assert scorer.tokens == 9 * LENGTH
    assert [without_threshold(s.skip) for s in scored] == [without_threshold(skip) for skip in skips]
    for candidate in scored:
        quality = quality_at(float64_model(), candidate.skip, TEXT[:9])
        assert candidate.ratio == quality.skip_ratio.mean == pytest.approx(0.2, abs=0.02)
        expected = [kl * 0.2 / quality.skip_ratio.mean for kl in quality.kl_by_sequence]
        assert candidate.kl.tolist() == pytest.approx(expected, rel=1e-12)


def test_on_generated_text_candidates_are_scored_behind_the_prompts() -> None:
    model, prompt = float64_model(), 9
    record = record_generated(model, TEXT[:, :prompt], 20)
    (scored,) = scorer_of(model, record, 0.15).score([rule(model).skip])
    behind_prompts = scored.skip.model_copy(update={"warm_up": WARM_UP + prompt})
    quality = quality_at(model, behind_prompts, record.sequences)
    assert scored.skip.warm_up == WARM_UP
    assert scored.ratio == quality.skip_ratio.mean
    assert float(scored.kl.mean()) == pytest.approx(quality.kl.mean * 0.15 / scored.ratio)


def test_candidates_that_cannot_reach_the_ratio_are_left_out() -> None:
    scorer = scorer_of(float64_model(), record_text(float64_model(), TEXT), 0.4)
    possible, *others = (
        rule(float64_model(), **options).skip for options in ({}, {"window": 1}, {"cold_s": 3}, {"refresh_every": 2})
    )
    assert [without_threshold(s.skip) for s in scorer.score([*others, possible])] == [without_threshold(possible)]
    assert scorer.score(others) == []


@pytest.mark.parametrize(("ratio", "gain"), [(0.15, 3), (0.2, 3), (0.25, 1), (0.3, 1)])
def test_thresholds_are_corrected_where_the_running_model_skips_something_else(ratio: float, gain: float) -> None:
    """Here it skips up to a fifth less than was simulated; a correction that makes it worse is dropped."""
    model = float64_model("gpt2")
    record, profile = record_text(model, TEXT), rule(model, window=1, cold_s=0, cold_e=N_LAYERS)
    simulated = profile.with_threshold(solve_threshold(record, profile.skip, ratio))
    error = abs(measure_ratio(Lab(model), simulated, record) - ratio)
    (scored,) = scorer_of(model, record, ratio).score([profile.skip])
    assert error > 0.015
    assert abs(scored.ratio - ratio) <= error / gain + 1e-12


def calibrated(model: PreTrainedModel, goal: Goal = GOAL, text: Tensor = TEXT, **choices: Any) -> Profile:
    held_out = pico_tokens(LENGTH, batch=3, seed=1)
    return calibrated_on(model, text, held_out, goal, **{"candidates": 16, **choices})[0].profile


def test_a_layer_that_must_not_be_skipped_ends_up_outside_of_the_region() -> None:
    """Layer 4 turns the stream more than those before it, but not so much that the curve would say so."""
    found = calibrated(float64_model("llama", 1.0, 0.6, 0.6, 0.6, 1.2, 1.0), cold_s=1, window=None, refresh_every=None)
    assert any(other.cold_e == 5 for other in found.search.candidates[1:]), "the curve did not propose it"
    assert (found.skip.cold_s, found.skip.cold_e) == (1, 4)


def test_a_window_that_jumps_over_such_a_layer_is_found() -> None:
    """Every token triggers at layer 1 first. A window of 1 skips 2 and 4, and runs layer 3."""
    model = float64_model("llama", 1.0, 0.02, 0.2, 2.0, 0.2, 1.0)
    found = calibrated(model, cold_s=1, cold_e=5, refresh_every=None)
    assert found.skip.window == 1


def test_the_profile_keeps_the_evidence_with_the_chosen_rule_first_and_the_same_bytes_each_time() -> None:
    found = calibrated(float64_model(), candidates=7)
    first, *others = found.search.candidates
    for name in ("cold_s", "cold_e", "window", "refresh_every"):
        assert getattr(first, name) == getattr(found.skip, name)
    assert 3 <= len(others) <= 6
    assert first.standard_error == 0
    assert all(other.standard_error > 0 for other in others)
    assert (found.search.ratio, found.search.tokens) == (0.2, TEXT.numel())
    assert dump_profile(calibrated(float64_model(), candidates=7)) == dump_profile(found)


@pytest.mark.parametrize(("length", "sequences"), itertools.product((4, 6), (2, 3)))
def test_the_smallest_texts_are_searched_too(length: int, sequences: int) -> None:
    choices = {"sequence_length": length, "warm_up": "auto", "cold_s": 1, "cold_e": 5}
    found = calibrated(float64_model(), Goal("max_kl", 50.0), pico_tokens(length, batch=sequences), **choices)
    assert found.measured.skip_ratio > 0.2


def test_a_ratio_beyond_the_proposed_region_widens_it_or_is_refused() -> None:
    """The free ends of the region are moved outwards as far as the target needs; a pinned one is not."""
    region = calibrated(float64_model(), Goal("target_ratio", 0.5)).skip
    assert region.cold_e - region.cold_s >= 4
    with pytest.raises(FfnskipError, match=r"^A skip ratio of 0\.9 cannot be reached: layers 0 to 5 [^\n]+\.$"):
        calibrated(float64_model(), Goal("target_ratio", 0.9))
