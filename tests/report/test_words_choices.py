"""Why a profile has its region, window, refresh and warm-up: what its search bears out."""

from typing import Any

import pytest
from support.factories import make_compensated, make_profile
from support.sentences import numbers

from ffnskip_cli.report.words import explain

WINDOW_1 = {"cold_s": 1, "cold_e": 5, "window": 1, "refresh_every": None, "kl": 0.3239, "standard_error": 0.0}
PAPER = {**WINDOW_1, "window": None, "kl": 1.4012, "standard_error": 0.1}
CLOSE = {**WINDOW_1, "cold_s": 2, "window": 2, "refresh_every": 6, "kl": 0.36, "standard_error": 0.02}
WARM_UPS = [
    {"warm_up": warm_up, "kl": kl, "standard_error": error, "repetition": 0.2}
    for warm_up, kl, error in ((0, 0.9, 0.05), (10, 0.35, 0.02), (25, 0.33, 0.02), (100, 0.32, 0.0))
]


def searched(*candidates: dict[str, Any], warm_up: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"ratio": 0.1, "tokens": 2048, "candidates": list(candidates), "warm_up": warm_up or []}


def only(words: str, **overrides: Any) -> str:
    """The one sentence of a profile that holds these words."""
    (sentence,) = [sentence for sentence in explain(make_profile(**overrides)) if words in sentence]
    return sentence


@pytest.mark.parametrize(
    ("others", "papers"),
    [
        pytest.param((PAPER, CLOSE), "1.401", id="in-the-same-layers"),
        pytest.param(({**PAPER, "cold_e": 4}, CLOSE), "1.401 1 3", id="in-other-layers"),
        pytest.param(({**PAPER, "cold_e": 4, "kl": 0.5}, PAPER), "1.401", id="the-same-layers-come-first"),
        pytest.param(({**PAPER, "refresh_every": 6}, CLOSE), "", id="a-refreshed-rule-is-not-the-papers"),
    ],
)
def test_the_rule_that_cost_least_is_compared_with_the_papers(others: tuple[dict[str, Any], ...], papers: str) -> None:
    sentence = only("Of 3 rules", window=1, search=searched(WINDOW_1, *others))
    assert "window 1 in layers 1 to 4 cost least" in sentence
    chosen = ["3", "0.1", "2,048", "1", "1", "4", "0.324"]
    assert numbers(sentence) == [*chosen, *papers.split()]
    assert ("same layers" in sentence) is (papers == "1.401")


def test_the_papers_own_rule_is_not_compared_with_itself() -> None:
    sentence = only("rules tried", search=searched({**WINDOW_1, "kl": 2.0}, PAPER))
    assert numbers(sentence) == ["2", "0.1", "2,048", "1", "4", "1.401"]


@pytest.mark.parametrize(("error", "noise"), [(0.01, False), (0.02, True)])
def test_a_chosen_rule_that_did_not_cost_least_is_not_said_to(error: float, noise: bool) -> None:
    search = searched({**CLOSE, "standard_error": 0.0}, PAPER, {**WINDOW_1, "standard_error": error})
    sentence = only("Of 3 rules", cold_s=2, window=2, refresh_every=6, search=search)
    assert numbers(sentence) == ["3", "0.1", "2,048", "2", "6", "2", "4", "0.360", "0.324", "1", "1", "4"]
    assert ("cost least" in sentence, "within noise" in sentence) == (False, noise)


@pytest.mark.parametrize(
    ("errors", "start"), [((0.01, 0.1), "None of the others is"), ((0.02, 0.1), "One"), ((0.02, 0.6), "2 others are")]
)
def test_rivals_are_those_within_three_standard_errors(errors: tuple[float, float], start: str) -> None:
    rivals = [{**rule, "standard_error": error} for rule, error in zip((CLOSE, PAPER), errors, strict=True)]
    assert only("within noise", window=1, search=searched(WINDOW_1, *rivals)).startswith(start)


@pytest.mark.parametrize("search", [searched(WINDOW_1), searched(PAPER, CLOSE), searched(), searched(warm_up=WARM_UPS)])
def test_no_choice_is_explained_where_there_was_none_or_it_is_not_the_profiles(search: dict[str, Any]) -> None:
    assert explain(make_profile(window=1, search=search)) == explain(make_profile(window=1))


@pytest.mark.parametrize(
    ("warm_up", "stated", "smallest"),
    [
        (10, ["10", "4", "0.350", "0.320", "100"], True),
        (25, ["4", "25", "0.330", "0.320", "100"], False),
        (0, ["4", "0", "0.900", "0.320", "100"], False),
        (100, ["4", "100", "0.320"], False),
    ],
)
def test_a_warm_up_is_called_the_smallest_within_noise_only_if_it_is(
    warm_up: int, stated: list[str], smallest: bool
) -> None:
    sentence = only("tried", warm_up=warm_up, search=searched(warm_up=WARM_UPS))
    assert numbers(sentence) == stated
    assert ("smallest" in sentence) is smallest


def test_warm_ups_of_predicted_damage_are_explained_although_no_rules_were_tried() -> None:
    search = {"ratio": 0.25, "tokens": 0, "warm_up": [{**WARM_UPS[0], "warm_up": 2, "kl": 0.1}, *WARM_UPS]}
    without, told = (
        explain(make_compensated("mean", rule="predicted-damage", **found)) for found in ({}, {"search": search})
    )
    (sentence,) = [sentence for sentence in told if sentence not in without]
    assert numbers(sentence) == ["2", "5", "0.100"]
