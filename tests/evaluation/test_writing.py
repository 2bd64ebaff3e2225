"""What is counted in texts: repetition, loops, and agreement."""

import pytest

pytest.importorskip("lm_eval")

from ffnskip_cli.evaluation.figures import Pair
from ffnskip_cli.evaluation.writing import agreement, distinct, ends_in_loop, rouge_l, rows, token_agreement


@pytest.mark.parametrize(
    ("tokens", "looping"),
    [
        ([1, 2, 3, *[4] * 8], True),
        ([1, 2, 3, *[4] * 7], False),  # too short to be sure
        ([9, *[1, 2, 3] * 3], True),
        ([9, *[1, 2, 3] * 2], False),
        ([*[1, 2, 3] * 3, 9, 8], False),  # it has found its way out
        (list(range(64)) * 3, True),
        (list(range(100)), False),
        ([], False),
    ],
)
def test_a_text_ends_in_a_loop_that_goes_round_three_times(tokens: list[int], looping: bool) -> None:
    assert ends_in_loop(tokens) is looping


def test_distinct_n_is_the_share_of_different_ngrams() -> None:
    assert distinct([1, 1, 1, 2], 1) == 0.5
    assert distinct([1, 1, 1, 2], 2) == pytest.approx(2 / 3)
    assert distinct([], 1) == 1.0


def test_agreement_compares_token_by_token_over_the_longer_text() -> None:
    assert token_agreement([1, 2, 3], [1, 2, 4, 5]) == 0.5
    assert token_agreement([], []) == 1.0
    assert rouge_l("the sky is blue", "the sky is red") == pytest.approx(0.75)
    assert rouge_l("", "") == 1.0


def test_tables_have_a_row_per_task_and_part_and_leave_choices_out() -> None:
    pairs = [
        Pair("talk", "turn 1", 0, "say a", "", "a a a a a a a a", "a b c d"),
        Pair("talk", "turn 1", 1, "say b", "", "a b c d", "a b c d"),
        Pair("talk", "turn 2", 0, "say c", "", "x", "x"),
        Pair("choose", "", 0, "a or b?", "", "a", "b", written=False),
    ]

    def tokenize(text: str) -> list[int]:
        return [ord(word) for word in text.split()]

    found = {(row["task"], row["part"], row["metric"]): row for row in rows(pairs, tokenize)}
    assert {key[:2] for key in found} == {("talk", "turn 1"), ("talk", "turn 2")}
    loops = found["talk", "turn 1", "ends in a loop"]
    assert (loops["dense"], loops["ffnskip"], loops["difference"]) == (0.5, 0.0, -0.5)
    assert loops["difference_stderr"] == pytest.approx(0.5)
    assert found["talk", "turn 1", "length in tokens"]["dense"] == 6.0
    first, second = agreement(pairs, tokenize)
    assert (first["texts"], first["same"], second["same"]) == (2, 0.5, 1.0)
    assert first["token_agreement"] == pytest.approx((1 / 8 + 1) / 2)
