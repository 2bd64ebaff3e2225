"""`ffnskip diff`: the headlines of a difference, and every field of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support import factories
from support.cli import mistake, run, succeed
from support.factories import CALIBRATION, TEXT, make_compensated, make_profile
from support.sentences import numbers

from ffnskip.profiles.profile import Profile, load_profile, save_profile
from ffnskip_cli.report.diff import changes, headlines

MEASURED = {**factories.MEASURED, "standard_error": {"kl": 0.03, "skip_ratio": 0.003}}
FULL = {
    "calibration": CALIBRATION,
    "evaluation": TEXT,
    "measured": MEASURED,
    "similarity": {"mean": [0.1, 0.8, 0.8, 0.8, 0.8, 0.2], "low": [0.0] * 6, "high": [1.0] * 6},
    "curve": [[0.95, 0.1, 0.2], [0.9, 0.2, 0.4]],
}
CANDIDATE = {"cold_s": 1, "cold_e": 5, "window": None, "refresh_every": None, "kl": 0.2, "standard_error": 0.0}
TRIAL = {"warm_up": 2, "kl": 0.1, "standard_error": 0.0, "repetition": 0.2}
SEARCH = {"ratio": 0.1, "tokens": 2048, "candidates": [CANDIDATE, {**CANDIDATE, "window": 1}], "warm_up": [TRIAL]}
OTHER_TRIAL = {**SEARCH, "warm_up": [{**TRIAL, "kl": 0.3}]}


def profile(**overrides: Any) -> Profile:
    return make_profile(**{**FULL, **overrides})


def remeasured(**figures: Any) -> Profile:
    return profile(measured={**MEASURED, **figures})


def damage(**overrides: Any) -> Profile:
    return make_compensated("mean", rule="predicted-damage", **{"threshold": 0.01, **overrides})


def rows(old: Profile, new: Profile) -> dict[str, tuple[Any, Any, Any]]:
    found = [change.row() for change in changes(old, new)]
    return {str(row["field"]): (row["a"], row["b"], row["change"]) for row in found}


def headline(old: Profile, new: Profile) -> str:
    """What the new one skips and costs."""
    _, skips_and_costs, _ = headlines(old, new)
    return skips_and_costs


def test_equal_profiles_have_no_changes_and_one_headline() -> None:
    assert len(headlines(profile(), profile())) == 1
    assert changes(profile(), profile()) == []


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"id": "org/other"}, ["org/tiny", "org/other"]),
        ({"revision": "f" * 40, "config_sha256": "e" * 64}, ["org/tiny", "revision", "config_sha256"]),
        ({"warm_up": 3}, ["org/tiny"]),
    ],
)
def test_the_first_headline_names_the_models_and_how_they_differ(overrides: dict[str, Any], names: list[str]) -> None:
    said = headlines(profile(), profile(**overrides))[0]
    assert re.findall(r"org/\w+|revision|config_sha256|weights_sha256", said) == names


def test_ratio_and_cost_are_compared_with_their_errors() -> None:
    said = headline(profile(), remeasured(skip_ratio=0.15, kl=0.6))
    assert numbers(said) == ["5", "10.0", "15.0", "11.8", "0.4", "0.2", "0.6", "9.4"]
    assert (said.count("more"), "chance" in said) == (2, False)
    back = headline(remeasured(skip_ratio=0.15, kl=0.6), profile())
    assert numbers(back) == ["5", "15.0", "10.0", "11.8", "0.4", "0.6", "0.2", "9.4"]
    assert (back.count("fewer"), back.count("less")) == (1, 1)
    within_two_errors = headline(profile(), remeasured(kl=0.18))
    assert numbers(within_two_errors) == ["10.0", "0.02", "0.2", "0.18", "0.5"]
    assert "maybe chance" in within_two_errors


@pytest.mark.parametrize("errors", [{}, {"skip_ratio": 0.01}, {"kl": 0.0}])
def test_without_a_standard_error_of_both_none_is_claimed(errors: dict[str, float]) -> None:
    old = remeasured(standard_error={"kl": 0.0})
    said = headline(old, remeasured(standard_error=errors, kl=0.3))
    assert numbers(said) == ["10.0", "0.1", "0.2", "0.3"]
    assert "standard error" not in said


def test_a_change_that_rounding_hides_is_left_to_the_table() -> None:
    new = remeasured(skip_ratio=0.10001, flops_saved=0.05001)
    assert numbers(headline(profile(), new)) == ["10.0", "0.2"]
    assert [change.field for change in changes(profile(), new)] == ["measured.skip_ratio", "measured.flops_saved"]


def test_figures_of_different_texts_are_said_to_be() -> None:
    other = {**TEXT, "text_sha256": "f" * 64}
    new = profile(evaluation=other, measured={**MEASURED, "kl": 0.3})
    assert "another text" in headline(profile(), new)
    assert "another text" not in headline(profile(), remeasured(kl=0.3))


@pytest.mark.parametrize(
    ("before", "after", "names"),
    [(True, False, "over it: B"), (False, True, "over it: A"), (False, False, None), (True, True, None)],
)
def test_the_last_headline_is_the_verdict_on_both(before: bool, after: bool, names: str | None) -> None:
    old = remeasured(within_budget=before, verdict="over it: A")
    verdict = headlines(old, remeasured(within_budget=after, verdict="over it: B", kl=0.3))[-1]
    assert verdict.startswith("Both" if before == after else "A is within" if before else "B is within")
    assert re.findall("over it: .", verdict) == ([names] if names else [])
    assert ("over the" in verdict) == (not before and not after)


@pytest.mark.parametrize("goal", [{"max_kl": 0.25}, {"max_perplexity_increase": 0.05}])
def test_goals_of_different_kinds_can_be_compared(goal: dict[str, float]) -> None:
    new = remeasured(target_ratio=None, **goal)
    assert headlines(profile(), new)[0].endswith(f" ratio 0.1, and is {new.measured.goal}.")
    ((name, value),) = goal.items()
    assert rows(profile(), new) == {
        "measured.target_ratio": ("0.1", None, None),
        f"measured.{name}": (None, str(value), None),
    }


@pytest.mark.parametrize(("a", "b"), [({}, FULL), (FULL, {}), (FULL, {**FULL, "threshold": 0.8})])
def test_nothing_is_said_of_figures_that_one_lacks_or_that_are_the_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert len(headlines(make_profile(**a), make_profile(**b))) == 1


def test_what_cannot_be_subtracted_is_not() -> None:
    """Thresholds of two rules, similarities of other layers, stages of a fit: they are no layers."""
    assert rows(make_profile(window=2), damage())["skip.threshold"] == ("0.9", "0.01", None)
    assert rows(damage(), damage(threshold=0.02)) == {"skip.threshold": ("0.01", "0.02", "+0.01")}
    smaller = profile(n_layers=5, similarity={"mean": [0.1] * 5, "low": [0.0] * 5, "high": [1.0] * 5})
    assert rows(profile(), smaller)["similarity.mean"] == ("6 values", "5 values", None)
    fit = {"tokens": 4096, "text_sha256": "c" * 64, "gradient_tokens": 512, "ridge": 0.001, "ratio": 0.25}
    old, new = (damage(fit={**fit, "kl": [0.2, kl]}) for kl in (0.1, 0.05))
    assert rows(old, new) == {"fit.kl": ("2 values", "2 values", None)}


@pytest.mark.parametrize(
    ("a", "b", "changed"),
    [
        (
            SEARCH,
            {**SEARCH, "candidates": [CANDIDATE], "ratio": 0.2},
            {"search.ratio": ("0.1", "0.2", "+0.1"), "search.candidates": ("2 values", "1 values", "1 gone, 0 new")},
        ),
        (SEARCH, OTHER_TRIAL, {"search.warm_up": ("1 values", "1 values", "1 gone, 1 new")}),
        (None, {**SEARCH, "warm_up": []}, {"search.candidates": (None, "2 values", "0 gone, 2 new")}),
    ],
)
def test_what_was_tried_is_counted(
    a: dict[str, Any] | None, b: dict[str, Any], changed: dict[str, tuple[Any, Any, Any]]
) -> None:
    found = rows(profile(search=a), profile(search=b))
    assert {name: found[name] for name in changed} == changed
    assert a is None or found == changed


def test_every_field_that_differs_is_a_row_in_the_order_of_the_file() -> None:
    new = profile(
        gguf_sha256="f" * 64,
        cold_s=2,
        window=4,
        similarity={**FULL["similarity"], "low": [0.0, 0.0, -0.25, 0.1, 0.0, 0.0]},
        measured={**MEASURED, "kl": 0.3, "within_budget": False, "verdict": "x" * 100, "first_skipped": [0.1] * 6},
        curve=[[0.95, 0.1, 0.2], [0.8, 0.3, 0.6], [0.7, 0.4, 0.9]],
    )
    assert list(rows(profile(), new).items()) == [
        ("model.gguf_sha256", (None, "ffffffffffffffff…", None)),
        ("skip.cold_s", ("1", "2", "+1")),
        ("skip.window", (None, "4", None)),
        ("similarity.low", ("6 values", "6 values", "-0.25 at layer 2")),
        ("measured.kl", ("0.2", "0.3", "+0.1")),
        ("measured.verdict", ("within the quality budg…", f"{'x' * 23}…", None)),
        ("measured.within_budget", ("true", "false", None)),
        ("measured.first_skipped", (None, "6 values", None)),
        ("curve", ("2 values", "3 values", "1 gone, 2 new")),
    ]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    save_profile(profile(), a)
    save_profile(profile(threshold=0.85, measured={**MEASURED, "kl": 0.3}), b)
    return a, b


@pytest.mark.parametrize(
    ("format", "names", "bullet", "table"),
    [
        ("table", "A  {a}\nB  {b}", "", ["skip.threshold 0.9 0.85 -0.05", "measured.kl 0.2 0.3 +0.1"]),
        (
            "md",
            "**A** is {a}, **B** is {b}.",
            "- ",
            ["| skip.threshold | 0.9 | 0.85 | -0.05 |", "| measured.kl | 0.2 | 0.3 | +0.1 |"],
        ),
    ],
)
def test_a_page_is_names_headlines_and_a_table(
    files: tuple[Path, Path], format: str, names: str, bullet: str, table: list[str]
) -> None:
    a, b = files
    result = succeed("diff", a, b, "--format", format)
    first, words, found = result.stdout.rstrip().split("\n\n")
    assert first == names.format(a=a, b=b)
    assert words.splitlines() == [bullet + said for said in headlines(load_profile(a), load_profile(b))]
    assert [" ".join(line.split()) for line in found.splitlines()[2:]] == table
    assert result.stderr == ""


def test_json_is_one_document_with_values_in_full(files: tuple[Path, Path]) -> None:
    a, b = files
    document = json.loads(succeed("diff", a, b, "--format", "json").stdout)
    assert document == {
        "schema": "ffnskip-diff/v1",
        "a": str(a),
        "b": str(b),
        "identical": False,
        "sentences": headlines(load_profile(a), load_profile(b)),
        "changes": [
            {"field": "skip.threshold", "a": 0.9, "b": 0.85, "change": pytest.approx(-0.05), "layer": None},
            {"field": "measured.kl", "a": 0.2, "b": 0.3, "change": pytest.approx(0.1), "layer": None},
        ],
    }
    for path, threshold in zip(files, (-1.7e308, 1.7e308), strict=True):
        save_profile(profile(threshold=threshold), path)
    document = json.loads(succeed("diff", a, b, "--format", "json").stdout)
    assert document["changes"][0]["change"] is None  # too large for a number


def test_identical_profiles_have_no_table_and_the_exit_code_tells_of_a_difference_only_when_asked(
    files: tuple[Path, Path],
) -> None:
    a, b = files
    assert succeed("diff", a, a).stdout == f"A  {a}\nB  {a}\n\n{headlines(profile(), profile())[0]}\n\n"
    document = json.loads(succeed("diff", a, a, "--format", "json").stdout)
    assert (document["identical"], document["changes"]) == (True, [])
    for format in ("table", "md", "json"):
        assert run("diff", a, b, "--format", format).exit_code == 0
        assert run("diff", a, b, "--format", format, "--exit-code").exit_code == 1
        assert run("diff", a, a, "--format", format, "--exit-code").exit_code == 0


def test_a_file_that_is_no_profile_or_whose_weights_are_missing_is_a_sentence(tmp_path: Path) -> None:
    path, missing, broken = tmp_path / "a.yaml", tmp_path / "none.yaml", tmp_path / "broken.yaml"
    save_profile(damage(), path)
    broken.write_text("skip: 5")
    assert run("diff", path, path).exit_code == 0
    assert mistake("diff", path, missing).startswith(f"{missing}: cannot be read")
    assert mistake("diff", broken, path).startswith(f"{broken}: ")
    weights = tmp_path / str(damage().compensation.file)
    weights.unlink()
    assert mistake("diff", path, path).startswith(f"{weights}: cannot be read")
