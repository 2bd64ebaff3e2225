"""The paper's tables from one profile: a sweep, tokens that never skip, warm-ups."""

import pytest
import torch
from support.pico import float64_model, middle_threshold, pico_model, pico_profile, pico_tokens
from support.price import price_profile

from ffnskip import Decoder, Profile
from ffnskip.errors import FfnskipError
from ffnskip_cli.bench.never_skip import never_skipping
from ffnskip_cli.bench.suite import Plan
from ffnskip_cli.bench.tables import sweep, warm_ups, worst_case
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.threshold.move import Mover
from ffnskip_cli.measure.flops import model_cost, overhead
from ffnskip_cli.measure.quality import measure_quality
from ffnskip_cli.progress import silently

MODEL = float64_model()
TEXT = pico_tokens(32, batch=4)
PROMPTS = TEXT[:, :6]


def cosine() -> Profile:
    return pico_profile(MODEL, threshold=round(middle_threshold(MODEL, TEXT), 3), warm_up=2)


@pytest.mark.parametrize("profile", [price_profile(MODEL, warm_up=3), cosine()], ids=["price", "cosine"])
def test_a_profile_is_moved_to_each_saving_on_the_text(profile: Profile) -> None:
    mover, cost = Mover(Lab(MODEL), profile, TEXT), model_cost(MODEL)
    for wanted in (0.05, 0.1):
        (quality,) = measure_quality(MODEL, [mover.saving(wanted)], TEXT, silently)
        saved = cost.saved_share_past(quality.stats, overhead(profile, MODEL), *TEXT.shape)
        assert saved == pytest.approx(wanted, abs=0.01)


def test_a_sweep_has_the_rows_of_each_saving_and_says_what_is_out_of_reach() -> None:
    plan = Plan(frozenset({"quality", "opponents"}), 6, 9, 1, 2, ("random",))
    low, high, beyond = sweep(Lab(MODEL), cosine(), TEXT, (0.05, 0.1, 0.9), plan)
    assert [point["target"] for point in (low, high, beyond)] == [0.05, 0.1, 0.9]
    assert [row["name"] for row in high["rows"]] == ["dense", "ffnskip", "random"]
    assert 0 < low["rows"][1]["kl"] < high["rows"][1]["kl"]
    assert beyond["rows"] == []
    assert beyond["missing"].startswith("it saves at most 0.")


@pytest.mark.parametrize("path", ["general", "fused"])
def test_tokens_that_never_skip_are_counted_by_length_and_position(path: str) -> None:
    model = pico_model(dtype=torch.float32)
    profile = pico_profile(model, threshold=round(middle_threshold(model, TEXT), 3), warm_up=2)
    decoder = Decoder(model, profile, path=path)
    rows = never_skipping(decoder, PROMPTS, (2, 8, 20), silently)
    assert [(row["from"], row["length"]) for row in rows] == [(0, 2), (2, 8), (8, 20)]
    assert rows[0]["never_skip_fraction"] is None  # the warm-up is all there is
    counted = []
    for length in (8, 20):
        decoder.reset_stats()
        list(decoder.decode(PROMPTS, max_new_tokens=length))
        counted.append(decoder.stats)
    for row, stats in zip(rows[1:], counted, strict=True):
        assert row["never_skip_fraction"] == pytest.approx(stats.never_skip_fraction)
        assert row["skip_ratio"] == pytest.approx(stats.skip_ratio)
    later = (counted[1].never_skipped - counted[0].never_skipped) / (counted[1].tokens - counted[0].tokens)
    assert rows[2]["never_skip_fraction_here"] == pytest.approx(later)


def test_more_prompts_than_a_step_takes_are_all_counted() -> None:
    prompts = pico_tokens(6, batch=20)
    (row,) = never_skipping(Decoder(MODEL, cosine()), prompts, [8], silently)
    assert row["tokens"] == 20 * (8 - 1 - 2)  # without the last one, which is not fed back, and the warm-up


def test_the_worst_case_has_the_profile_and_the_papers_rule_at_its_threshold() -> None:
    rows = worst_case(Lab(MODEL), price_profile(MODEL, warm_up=3), TEXT, PROMPTS, [10])
    assert [(row["name"], row["rule"]) for row in rows] == [("profile", "price"), ("paper", "cosine")]
    assert rows[1]["threshold"] == 0.9
    windowed = cosine().with_skip(window=1, refresh_every=3)
    (_, paper) = worst_case(Lab(MODEL), windowed, TEXT, PROMPTS, [10])
    (expected,) = never_skipping(Decoder(MODEL, cosine().with_threshold(0.9)), PROMPTS, [10], silently)
    assert paper | expected == paper


def test_warm_ups_have_a_row_each_and_must_leave_half_of_the_continuation() -> None:
    found = warm_ups(Lab(MODEL), cosine(), TEXT, [0, 3, 8])
    assert [row["warm_up"] for row in found] == [0, 3, 8]
    assert found[0]["kl"] > found[2]["kl"] > 0
    with pytest.raises(FfnskipError, match="A warm-up of 9 leaves nothing to compare"):
        warm_ups(Lab(MODEL), cosine(), TEXT, [9])
