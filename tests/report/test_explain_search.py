"""Why a profile has its region, window, refresh and warm-up, in sentences that its search bears out."""

from typing import Any

import pytest
from support.factories import make_compensated, make_profile

from ffnskip_cli.report.explain import explain

WINDOW_1 = {"cold_s": 1, "cold_e": 5, "window": 1, "refresh_every": None, "kl": 0.3239, "standard_error": 0.0}
PAPER = {**WINDOW_1, "window": None, "kl": 1.4012, "standard_error": 0.1}
CLOSE = {**WINDOW_1, "cold_s": 2, "window": 2, "refresh_every": 6, "kl": 0.36, "standard_error": 0.02}


def only(words: str, **overrides: Any) -> str:
    """The one sentence of a profile that holds these words."""
    (sentence,) = [sentence for sentence in explain(make_profile(**overrides)) if words in sentence]
    return sentence


def searched(*candidates: dict[str, Any], warm_up: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"ratio": 0.1, "tokens": 2048, "candidates": list(candidates), "warm_up": list(warm_up)}


def trial(warm_up: int, kl: float, standard_error: float) -> dict[str, Any]:
    return {"warm_up": warm_up, "kl": kl, "standard_error": standard_error, "repetition": 0.2}


OF_3 = "Of 3 rules tried at a ratio of 0.1 on 2,048 tokens of the calibration text"


def test_the_rule_that_cost_least_is_compared_with_the_papers_in_the_same_layers() -> None:
    assert only("Of 3 rules", window=1, search=searched(WINDOW_1, PAPER, CLOSE)) == (
        f"{OF_3}, window 1 in layers 1 to 4 cost least: KL 0.324, against 1.401 for the paper's rule (no window) in "
        "the same layers."
    )


def test_the_papers_rule_in_other_layers_is_said_to_be_there() -> None:
    search = searched(WINDOW_1, {**PAPER, "cold_e": 4}, CLOSE)
    assert only("Of 3 rules", window=1, search=search).endswith(
        " cost least: KL 0.324, against 1.401 for the paper's rule (no window) in layers 1 to 3."
    )


def test_the_papers_rule_in_the_same_layers_is_preferred_to_a_better_one_elsewhere() -> None:
    search = searched(WINDOW_1, {**PAPER, "cold_e": 4, "kl": 0.5}, PAPER)
    assert only("Of 3 rules", window=1, search=search).endswith(
        "against 1.401 for the paper's rule (no window) in the same layers."
    )


def test_a_refreshed_rule_is_not_taken_for_the_papers() -> None:
    search = searched(WINDOW_1, {**PAPER, "refresh_every": 6}, CLOSE)
    assert only("Of 3 rules", window=1, search=search) == f"{OF_3}, window 1 in layers 1 to 4 cost least: KL 0.324."


def test_the_papers_own_rule_is_not_compared_with_itself() -> None:
    search = searched({**WINDOW_1, "kl": 2.0}, PAPER)
    assert only("rules tried", search=search).endswith(", no window in layers 1 to 4 cost least: KL 1.401.")


@pytest.mark.parametrize(("error", "noise"), [(0.01, ""), (0.02, ", which is within noise (three standard errors)")])
def test_a_chosen_rule_that_did_not_cost_least_is_not_said_to(error: float, noise: str) -> None:
    search = searched({**CLOSE, "standard_error": 0.0}, PAPER, {**WINDOW_1, "standard_error": error})
    assert only("Of 3 rules", cold_s=2, window=2, refresh_every=6, search=search) == (
        f"{OF_3}, window 2, one token in 6 dense, in layers 2 to 4 was chosen: KL 0.360, against 0.324 for the lowest, "
        f"window 1 in layers 1 to 4{noise}."
    )


@pytest.mark.parametrize(
    ("errors", "start"),
    [((0.01, 0.1), "None of the others is"), ((0.02, 0.1), "One other is"), ((0.02, 0.6), "2 others are")],
)
def test_rivals_are_those_within_three_standard_errors(errors: tuple[float, float], start: str) -> None:
    rivals = [{**rule, "standard_error": error} for rule, error in zip((CLOSE, PAPER), errors, strict=True)]
    sentence = only("within noise", window=1, search=searched(WINDOW_1, *rivals))
    assert sentence == f"{start} within noise of it (three standard errors of the difference)."


@pytest.mark.parametrize("search", [searched(WINDOW_1), searched(PAPER, CLOSE), searched()])
def test_no_choice_is_explained_where_there_was_none_or_it_is_not_the_profiles(search: dict[str, Any]) -> None:
    assert explain(make_profile(window=1, search=search)) == explain(make_profile(window=1))


WARM_UPS = (trial(0, 0.9, 0.05), trial(10, 0.35, 0.02), trial(25, 0.33, 0.02), trial(100, 0.32, 0.0))


@pytest.mark.parametrize(
    ("warm_up", "sentence"),
    [
        (
            10,
            "The warm-up of 10 is the smallest of the 4 tried that is within noise (two standard errors) of the best: "
            "KL 0.350, against 0.320 for the best, 100.",
        ),
        (25, "Of 4 warm-ups tried, 25 was chosen: KL 0.330, against 0.320 for the best, 100."),
        (0, "Of 4 warm-ups tried, 0 was chosen: KL 0.900, against 0.320 for the best, 100."),
        (100, "Of 4 warm-ups tried, 100 was chosen: KL 0.320, the lowest."),
    ],
)
def test_a_warm_up_is_called_the_smallest_within_noise_only_if_it_is(warm_up: int, sentence: str) -> None:
    assert only("tried", warm_up=warm_up, search=searched(warm_up=WARM_UPS)) == sentence


def test_a_warm_up_that_is_not_among_those_tried_is_not_explained() -> None:
    assert explain(make_profile(search=searched(warm_up=WARM_UPS))) == explain(make_profile())


def test_warm_ups_of_predicted_damage_are_explained_although_no_rules_were_tried() -> None:
    search = {"ratio": 0.25, "tokens": 0, "warm_up": [trial(0, 0.3, 0.02), trial(2, 0.1, 0.0)]}
    without, told = (
        explain(make_compensated("mean", rule="predicted-damage", **found)) for found in ({}, {"search": search})
    )
    assert [sentence for sentence in told if sentence not in without] == [
        "The warm-up of 2 is the smallest of the 2 tried that is within noise (two standard errors) of the best: "
        "KL 0.100, the lowest."
    ]
