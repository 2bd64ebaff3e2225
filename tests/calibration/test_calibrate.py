"""The whole calibration on a pico model: the profile says what is true, and nothing about where it was made."""

import math
from functools import cache
from statistics import fmean
from typing import Any

import pytest
import torch
from support.calibrations import WARM_UP, calibrated_on, ratio_by_apply
from support.naive import naive_quality
from support.pico import HIDDEN, N_LAYERS, float64_model, pico_model, pico_tokens
from torch import Tensor
from transformers import PreTrainedModel

from ffnskip import FfnskipError, SkipStats
from ffnskip.decode import GeneralPath, generate_tokens
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.profile import dump_profile, parse_profile
from ffnskip.profiles.schema import Skip
from ffnskip_cli.budget import MAX_KL, MIN_TOP1_AGREEMENT
from ffnskip_cli.calibration.assemble import Calibrated, verdict
from ffnskip_cli.calibration.recording.record import record_text
from ffnskip_cli.calibration.settings import GENERATED_TOKENS, PROMPT_TOKENS, Goal
from ffnskip_cli.measure.flops import model_cost
from ffnskip_cli.measure.quality import Estimate, Quality

MODEL, LENGTH = float64_model(), 24
TEXT, HELD_OUT = pico_tokens(LENGTH, batch=12), pico_tokens(LENGTH, batch=4, seed=1)
TARGETS = (0.1, 0.2)


def compiled(*targets: float, text: Tensor = TEXT, held_out: Tensor = HELD_OUT, **choices: Any) -> list[Calibrated]:
    goals = [Goal("target_ratio", target) for target in targets or TARGETS]
    return calibrated_on(choices.pop("model", MODEL), text, held_out, *goals, **choices)


@cache
def calibrated() -> list[Calibrated]:
    return compiled()


def test_each_target_is_what_the_running_model_skips_on_the_calibration_text() -> None:
    for target, found in zip(TARGETS, calibrated(), strict=True):
        ratio = ratio_by_apply(MODEL, found.profile, TEXT)
        assert ratio == pytest.approx(target, abs=0.01)
        assert found.calibration_ratio == ratio


def test_every_measured_figure_is_what_a_naive_run_gives() -> None:
    for found in calibrated():
        figures = found.profile.measured
        expected = naive_measurements(found.profile.skip)
        actual = {name: getattr(figures, name) for name in expected}
        assert actual == pytest.approx(expected, rel=6e-5)  # written with five digits
        assert figures.tokens == 4 * (LENGTH - 1 - WARM_UP)
        assert figures.within_budget == (figures.kl <= 0.25 and figures.top1_agreement >= 0.8)


def naive_measurements(skip: Skip) -> dict[str, float]:
    rows = [naive_quality(MODEL, sequence, skip) for sequence in HELD_OUT]
    means = {name: fmean(figures[name] for figures, _ in rows) for name in rows[0][0]}
    past = [token for _, naive in rows for token in naive.tokens[WARM_UP:]]
    compared = sum(layer < skip.cold_e - 1 for token in past for layer in token.compared)
    saved = sum(sum(token.skipped) for token in past) * 2 * 3 * HIDDEN * 48 - compared * 7 * HIDDEN
    return {
        **{name: means[name] for name in ("skip_ratio", "kl", "top1_agreement")},
        "perplexity_dense": math.exp(means["nll_dense"]),
        "perplexity": math.exp(means["nll"]),
        "flops_saved": saved / (4 * model_cost(MODEL).dense_flops(0, LENGTH)),
        "never_skip_fraction": fmean(not any(token.skipped) for token in past),
    }


def test_the_profile_tells_both_texts_apart_and_what_was_asked_for() -> None:
    profile = compiled(0.1, window=2, refresh_every=4, seed=5)[0].profile
    text, other = profile.calibration, profile.evaluation
    assert (text.dataset, other.dataset) == ("own", "other")
    assert (text.tokens_requested, text.tokens_used) == (TEXT.numel() + 7, TEXT.numel())
    assert (other.tokens_used, other.sequence_length) == (HELD_OUT.numel(), LENGTH)
    assert (text.seed, text.dtype, text.on) == (5, "float64", "text")
    assert (profile.skip.warm_up, profile.skip.window, profile.skip.refresh_every) == (WARM_UP, 2, 4)
    assert profile.measured.target_ratio == 0.1
    assert parse_profile(dump_profile(profile)) == profile


def test_the_curve_is_one_for_all_targets_and_goes_through_every_profile() -> None:
    first, second = (found.profile for found in calibrated())
    assert first.curve == second.curve
    ratios = [point.skip_ratio for point in first.curve]
    assert ratios == sorted(ratios)
    assert len(ratios) >= 8
    for profile in (first, second):
        point = (profile.skip.threshold, profile.measured.skip_ratio, profile.measured.kl)
        assert point in first.curve


def test_the_similarity_curve_is_that_of_the_tokens_past_warm_up() -> None:
    curve = calibrated()[0].profile.similarity
    past = record_text(MODEL, TEXT).values[:, WARM_UP:].flatten(0, 1)
    ordered = past.sort(dim=0).values
    tenth, last_tenth = ordered[len(past) // 10], ordered[-len(past) // 10]
    assert curve.mean == pytest.approx(past.mean(dim=0).tolist(), rel=2e-5)
    assert curve.low == pytest.approx(tenth.tolist(), abs=0.01)
    assert curve.high == pytest.approx(last_tenth.tolist(), abs=0.01)


def test_the_region_can_be_pinned_on_either_side() -> None:
    for pins, region in {(None, None): (2, 5), (1, None): (1, 5), (None, 6): (2, 6), (0, 4): (0, 4)}.items():
        skip = compiled(0.1, cold_s=pins[0], cold_e=pins[1])[0].profile.skip
        assert (skip.cold_s, skip.cold_e) == region


def overflowing() -> PreTrainedModel:
    model = pico_model(dtype=torch.float16)
    with torch.no_grad():
        ffn_sites(model)[3].layer.get_submodule("mlp.down_proj").weight *= 60_000
    return model


@pytest.mark.parametrize(
    ("targets", "options", "words"),
    [
        *[
            ((), {"cold_s": cold_s, "cold_e": cold_e}, r"The skip region [^\n]+ within the model's 6 layers")
            for cold_s, cold_e in ((4, 4), (5, 3), (0, N_LAYERS + 1), (N_LAYERS, None))
        ],
        ((0.9,), {}, r"0\.9 cannot be reached: layers 0 to 5 allow at most 0\.833"),
        ((), {"held_out": HELD_OUT[:1]}, "at least two sequences of text"),
        ((0.1, 1.0), {}, "The target 1 is not a ratio between 0 and 1"),
        ((), {"warm_up": LENGTH - 1}, "--warm-up must be at most 22"),
        ((), {"on": "generated"}, "--sequence-length is 256"),
        ((), {"model": pico_model("bloom")}, "their FFNs add the residual stream themselves"),
        ((), {"model": overflowing()}, " activations are not finite numbers: try another --dtype"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(targets: tuple[float, ...], options: dict[str, Any], words: str) -> None:
    with pytest.raises(FfnskipError, match=rf"^[^\n]*{words}[^\n]*\.$"):
        compiled(*targets, **options)


@pytest.mark.parametrize(("ffn_scale", "within"), [(0.5, True), (1.5, False)])
def test_the_verdict_follows_the_damage(ffn_scale: float, within: bool) -> None:
    model = float64_model("llama", *[ffn_scale**3] * N_LAYERS)
    measured = compiled(0.2, model=model, cold_s=1, cold_e=5)[0].profile.measured
    assert measured.within_budget == within
    assert measured.verdict.startswith("within the quality budget" if within else "over the quality budget")


@pytest.mark.parametrize(
    ("kl", "agreement", "broken"),
    [(0.05, 0.9, []), (0.06, 0.9, ["KL 0.06"]), (0.01, 0.8, ["top-1 agreement 0.80"]), (9, 0, ["KL 9.00", "0.00"])],
)
def test_the_verdict_names_what_is_over_budget(kl: float, agreement: float, broken: list[str]) -> None:
    zero = Estimate(0.0, 0.0)
    quality = Quality(2, 2, zero, zero, Estimate(kl, 0.0), Estimate(agreement, 0.0), zero, SkipStats(N_LAYERS), ())
    within, sentence = verdict(quality)
    assert within == (not broken)
    assert all(words in sentence for words in broken)
    assert ("KL" in sentence, "top-1" in sentence) == (kl > MAX_KL or within, agreement < MIN_TOP1_AGREEMENT or within)


def test_calibrating_on_generated_tokens_counts_none_of_the_prompts() -> None:
    length = PROMPT_TOKENS + GENERATED_TOKENS
    prompts, held_out = pico_tokens(length, batch=3), pico_tokens(length, batch=2, seed=1)
    (found,) = compiled(0.15, text=prompts, held_out=held_out, on="generated")
    assert found.profile.calibration.on == "generated"
    assert found.calibration_ratio == pytest.approx(0.15, abs=0.01)

    sequences = prompts[:, :PROMPT_TOKENS]
    generated = list(generate_tokens(GeneralPath(MODEL), sequences, max_new_tokens=GENERATED_TOKENS))
    behind_prompts = found.profile.skip.model_copy(update={"warm_up": PROMPT_TOKENS + WARM_UP})
    whole = torch.cat([sequences, torch.stack(generated, dim=1)], dim=1)
    profile = found.profile.model_copy(update={"skip": behind_prompts})
    assert found.calibration_ratio == ratio_by_apply(MODEL, profile, whole)

    (other_continuations,) = compiled(0.15, text=prompts, held_out=held_out)
    assert other_continuations.profile.skip.threshold != found.profile.skip.threshold
