"""Standard errors of figures and of differences over pairs."""

import math
import statistics

import pytest

pytest.importorskip("lm_eval")

from ffnskip_cli.evaluation.errors import Figure, mean, paired, weighted


def root_mean_square(values: list[float]) -> float:
    return math.sqrt(statistics.fmean(value**2 for value in values))


def test_a_mean_has_the_textbook_error_and_one_value_alone_has_none() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert mean(values).value == pytest.approx(0.6)
    assert mean(values).stderr == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert mean([0.5]) == Figure(0.5, None)


def test_the_difference_of_models_that_fail_together_is_known_better_than_either_figure() -> None:
    dense = [float(i % 2) for i in range(100)]
    skipping = [0.0, *dense[1:-1], 0.0]  # one more mistake
    found = paired(dense, skipping)
    assert found.difference.value == pytest.approx(-0.01)
    assert found.difference.stderr == pytest.approx(0.01)
    assert found.dense.stderr == pytest.approx(0.0503, abs=1e-4)


def test_a_figure_that_is_no_mean_has_the_errors_of_a_bootstrap_over_pairs() -> None:
    values = [float(i % 10) for i in range(400)]
    by_bootstrap = paired(values, [value + 1 for value in values], statistics.fmean)
    assert by_bootstrap.dense.stderr == pytest.approx(mean(values).stderr, rel=0.15)
    assert by_bootstrap.difference.stderr == pytest.approx(0.0, abs=1e-9)  # every pair differs by 1
    other = paired(values, values[::-1], root_mean_square)
    assert other.difference.value == pytest.approx(0.0)
    assert other.difference.stderr > 0.05
    assert paired([1.0], [2.0], statistics.fmean).difference == Figure(1.0, None)


def test_a_group_weighs_its_tasks_and_their_errors() -> None:
    parts = {"a": paired([0.0, 1.0], [1.0, 1.0]), "b": paired([0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0])}
    group = weighted(parts, {"a": 0.25, "b": 0.75})
    assert group.difference.value == pytest.approx(0.25 * 0.5 + 0.75 * 0.25)
    errors = [parts[name].difference.stderr for name in "ab"]
    assert group.difference.stderr == pytest.approx(math.hypot(0.25 * errors[0], 0.75 * errors[1]))
    assert weighted({"a": paired([1.0], [0.0])}, {"a": 1.0}).dense == Figure(1.0, None)
