"""The choice of the warm-up: on what the dense model writes, over the same late tokens for each, the smallest good."""

from functools import cache
from typing import Any

import pytest
import torch
from support.calibrations import calibrated_on
from support.naive import naive_forward
from support.pico import float64_model, pico_profile, pico_tokens
from torch import Tensor

import ffnskip
from ffnskip import Profile
from ffnskip.decode import GeneralPath, generate_tokens
from ffnskip.profiles.evidence import WarmUpTrial
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.rules.base import PROMPTS, WARM_UPS, ablate, lengths, possible_warm_ups, smallest_good
from ffnskip_cli.calibration.settings import GENERATED_TOKENS, PROMPT_TOKENS, Goal
from ffnskip_cli.measure.quality import repetition

MODEL = float64_model()
LENGTH, PROMPT = 44, 22  # for which warm-ups of 0, 5 and 10 are possible
THRESHOLD = 0.965
TEXT = pico_tokens(LENGTH, batch=PROMPTS + 2)


def rule(**options: Any) -> Profile:
    return pico_profile(MODEL, **{"threshold": THRESHOLD, **options})


@cache
def trials() -> list[WarmUpTrial]:
    return ablate(Lab(MODEL), rule(), TEXT, (0, 5, 10))


def greedy(prompt: Tensor, new_tokens: int) -> Tensor:
    """The prompt and its dense continuation, ``[length]``, without a cache."""
    for _ in range(new_tokens):
        with torch.inference_mode():
            following = MODEL(prompt[None], use_cache=False).logits[0, -1].argmax()
        prompt = torch.cat([prompt, following[None]])
    return prompt


@cache
def naive_kl() -> Tensor:
    """``[prompts, warm-ups]``: mean over the second half of each continuation, token by token."""
    table = []
    for prompt in TEXT[:PROMPTS, :PROMPT]:
        text = greedy(prompt, LENGTH - PROMPT)
        with torch.inference_mode():
            dense = MODEL(text[None]).logits[0].softmax(-1)
        row = []
        for warm_up in (0, 5, 10):
            sparse = naive_forward(MODEL, text, rule(warm_up=warm_up).skip, prompt=PROMPT).logits.softmax(-1)
            late = slice(PROMPT + (LENGTH - PROMPT) // 2, LENGTH - 1)
            row.append(float((dense * (dense / sparse).log()).sum(-1)[late].mean()))
        table.append(row)
    return torch.tensor(table, dtype=torch.float64)


def test_each_trial_is_a_naive_run_over_the_second_half_of_the_dense_models_own_text() -> None:
    assert [trial.warm_up for trial in trials()] == [0, 5, 10]
    assert [trial.kl for trial in trials()] == pytest.approx(naive_kl().mean(dim=0).tolist(), rel=1e-5)
    assert len({trial.kl for trial in trials()}) == 3
    best = naive_kl().mean(dim=0).argmin()
    errors = (naive_kl() - naive_kl()[:, [best]]).std(dim=0) / PROMPTS**0.5  # of the difference, prompt by prompt
    assert [trial.standard_error for trial in trials()] == pytest.approx(errors.tolist(), rel=1e-3, abs=1e-12)


def test_repetition_is_that_of_what_the_model_writes_with_this_warm_up() -> None:
    prompts = TEXT[:PROMPTS, :PROMPT]
    for trial in trials():
        with ffnskip.apply(MODEL, rule(warm_up=trial.warm_up)):
            rows = torch.stack(
                list(generate_tokens(GeneralPath(MODEL), prompts, max_new_tokens=LENGTH - PROMPT)), dim=1
            )
        assert trial.repetition == pytest.approx(repetition(rows))


def test_prompt_and_continuation_fit_into_a_sequence_and_leave_half_a_continuation_to_measure_on() -> None:
    for length in range(2, 600, 13):
        prompt, generated = lengths(length)
        assert 1 <= prompt <= PROMPT_TOKENS
        assert prompt <= generated <= GENERATED_TOKENS or prompt == generated - 1
        assert prompt + generated <= length
        assert all(warm_up <= generated / 2 for warm_up in possible_warm_ups(length))


@pytest.mark.parametrize(
    ("length", "expected"),
    [(2, ()), (19, (0, 5)), (18, ()), (64, (0, 5, 10)), (199, WARM_UPS), (256, WARM_UPS), (5000, WARM_UPS)],
)
def test_shorter_sequences_leave_fewer_warm_ups_and_never_just_one(length: int, expected: tuple[int, ...]) -> None:
    assert possible_warm_ups(length) == expected


def trial(warm_up: int, kl: float, standard_error: float) -> WarmUpTrial:
    return WarmUpTrial(warm_up=warm_up, kl=kl, standard_error=standard_error, repetition=0.0)


@pytest.mark.parametrize(
    ("kls", "error", "chosen"),
    [
        ((0.50, 0.30, 0.22, 0.20), 0.01, 10),  # within two errors; 5 is not
        ((0.50, 0.30, 0.20, 0.22), 0.01, 10),  # the best itself
        ((0.20, 0.20, 0.20, 0.20), 0.01, 0),
        ((0.50, 0.40, 0.30, 0.20), 0.01, 20),
        ((0.21, 0.40, 0.30, 0.20), 0.01, 0),  # the smallest, though 5 and 10 are worse
        ((0.30, 0.20, 0.20, 0.30), 0.0, 5),
    ],
)
def test_the_smallest_within_two_errors_of_the_best_wins(kls: tuple[float, ...], error: float, chosen: int) -> None:
    assert smallest_good([trial(warm_up, kl, error) for warm_up, kl in zip((0, 5, 10, 20), kls, strict=True)]) == chosen


def calibrated(text: Tensor, **choices: Any) -> Profile:
    held_out = pico_tokens(text.shape[1], batch=3, seed=1)
    settings = {"warm_up": "auto", **choices}
    (found,) = calibrated_on(MODEL, text, held_out, Goal("target_ratio", 0.2), **settings)
    return found.profile


@pytest.mark.parametrize("candidates", [0, 3])
def test_the_profile_has_the_chosen_warm_up_and_the_evidence_for_it(candidates: int) -> None:
    profile = calibrated(TEXT, candidates=candidates)
    assert [trial.warm_up for trial in profile.search.warm_up] == [0, 5, 10]
    assert len(profile.search.candidates) == candidates
    assert profile.skip.warm_up == smallest_good(profile.search.warm_up)


def test_a_warm_up_that_was_given_is_kept_and_where_there_is_no_choice_a_quarter_of_the_sequence_runs_dense() -> None:
    profile = calibrated(TEXT[:, :18])
    assert (profile.skip.warm_up, profile.search) == (18 // 4, None)
    profile = calibrated(TEXT, candidates=2, warm_up=7)
    assert (profile.skip.warm_up, profile.search.warm_up) == (7, ())
