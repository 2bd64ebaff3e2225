"""`ffnskip diff`: how two profiles differ, in words and field by field."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.cli import mistake, run, succeed
from support.factories import TEXT, Kind, make_compensated, make_profile

from ffnskip.profiles.profile import Profile, load_profile, save_profile
from ffnskip_cli.report.diff import changes
from ffnskip_cli.report.diff_words import sentences

CALIBRATION = {**TEXT, "seed": 0, "dtype": "bfloat16", "on": "text"}
MEASURED = {
    "target_ratio": 0.1,
    "skip_ratio": 0.1,
    "flops_saved": 0.05,
    "never_skip_fraction": 0.4,
    "perplexity_dense": 7.0,
    "perplexity": 9.0,
    "kl": 0.2,
    "top1_agreement": 0.9,
    "tokens": 800,
    "standard_error": {"kl": 0.03, "skip_ratio": 0.003},
    "verdict": "within the quality budget",
    "within_budget": True,
}
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


def profile(**overrides: Any) -> Profile:
    return make_profile(**{**FULL, **overrides})


def said(**overrides: Any) -> list[str]:
    """The sentences, but the first one, on a profile that became another by these overrides."""
    same_model, *rest = sentences(profile(), profile(**overrides))
    assert same_model == "Both are for org/tiny."
    return rest


def remeasured(**figures: Any) -> list[str]:
    return said(measured={**MEASURED, **figures})


def test_equal_profiles_are_identical() -> None:
    assert sentences(profile(), profile()) == ["The profiles are identical."]
    assert changes(profile(), profile()) == []


@pytest.mark.parametrize(
    ("overrides", "first"),
    [
        ({"id": "org/other"}, "The profiles are for different models: A for org/tiny, B for org/other."),
        (
            {"revision": "f" * 40, "config_sha256": "e" * 64},
            "Both are for a model named org/tiny, but B's is another: it differs in revision, config_sha256.",
        ),
        ({"warm_up": 3}, "Both are for org/tiny."),
    ],
)
def test_whether_the_models_are_the_same_is_said_first(overrides: dict[str, Any], first: str) -> None:
    assert sentences(profile(), profile(**overrides))[0] == first


def test_ratio_and_cost_are_compared_with_their_errors() -> None:
    headline, others, verdict = remeasured(skip_ratio=0.15, kl=0.6, top1_agreement=0.8, perplexity=11.5)
    assert headline == (
        "B skips 5 points more FFNs (10.0% → 15.0%, 11.8 standard errors apart) "
        "and costs 0.4 nats per token more KL (0.2 → 0.6, 9.4 standard errors apart)."
    )
    assert others == "Also top-1 agreement fell from 90.0% to 80.0%, perplexity rose from 9 to 11.5."
    assert verdict == "Both are within the quality budget."


def test_a_difference_of_less_than_two_standard_errors_may_be_chance() -> None:
    assert remeasured(kl=0.18)[0] == (
        "B skips as many FFNs (10.0%) "
        "and costs 0.02 nats per token less KL (0.2 → 0.18, 0.5 standard errors apart, maybe chance)."
    )


@pytest.mark.parametrize("errors", [{}, {"skip_ratio": 0.01}, {"kl": 0.0}])
def test_without_a_standard_error_of_both_none_is_claimed(errors: dict[str, float]) -> None:
    old = profile(measured={**MEASURED, "standard_error": {"kl": 0.0}})
    new = profile(measured={**MEASURED, "standard_error": errors, "kl": 0.3})
    assert "and costs 0.1 nats per token more KL (0.2 → 0.3)." in sentences(old, new)[1]


def test_a_change_that_rounding_hides_is_left_to_the_table() -> None:
    measured = {**MEASURED, "skip_ratio": 0.10001, "flops_saved": 0.05001}
    assert said(measured=measured)[0] == "B skips as many FFNs (10.0%) and costs as much KL (0.2)."
    assert not [sentence for sentence in said(measured=measured) if "FLOPs" in sentence]
    assert [change.field for change in changes(profile(), profile(measured=measured))] == [
        "measured.skip_ratio",
        "measured.flops_saved",
    ]


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (True, False, "A is within the quality budget, B no longer is (over it: B)."),
        (False, True, "B is within the quality budget, which A was not (over it: A)."),
        (False, False, "Both are over the quality budget."),
    ],
)
def test_a_change_of_the_verdict_is_said(before: bool, after: bool, verdict: str) -> None:
    old = profile(measured={**MEASURED, "within_budget": before, "verdict": "over it: A"})
    new = profile(measured={**MEASURED, "within_budget": after, "verdict": "over it: B", "target_ratio": 0.2})
    assert sentences(old, new)[1] == "The goal was ratio 0.1, and is ratio 0.2."
    assert verdict in sentences(old, new)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"threshold": 0.85}, "The threshold fell from 0.9 to 0.85."),
        ({"cold_e": 6}, "The skip region grew by 1 layer: [1, 5) → [1, 6)."),
        ({"cold_s": 2, "cold_e": 4}, "The skip region shrank by 2 layers: [1, 5) → [2, 4)."),
        ({"cold_s": 2, "cold_e": 6}, "The skip region moved: [1, 5) → [2, 6)."),
        ({"warm_up": 0}, "The warm-up fell from 2 to 0 tokens."),
        ({"window": 4}, "FFNs skipped after a trigger, at most: all → 4."),
        ({"refresh_every": 6}, "Tokens until one runs dense again: no end → 6."),
        (
            {"calibration": {**CALIBRATION, "dataset": "c4", "seed": 1}},
            "B was calibrated on another text: wikitext:train → c4:train, with seed 0 → 1.",
        ),
        (
            {"calibration": {**CALIBRATION, "text_sha256": "f" * 64, "on": "generated"}},
            "B was calibrated on other text of wikitext:train, with on text → generated.",
        ),
        (
            {"calibration": {**CALIBRATION, "revision": "main"}},
            "B was calibrated on the same text of wikitext:train, with revision none → main.",
        ),
        (
            {"similarity": {**FULL["similarity"], "mean": [0.1, 0.8, 0.7, 0.85, 0.8, 0.2]}},
            "The mean similarity changed most in layer 2: 0.8000 → 0.7000.",
        ),
        ({"curve": []}, "Only A has the section `curve`."),
        (
            {"made_with": {"ffnskip": "0.2.0", "torch": "2.13.0"}},
            "They were made with different versions: ffnskip 0.1.0 → 0.2.0, torch none → 2.13.0.",
        ),
    ],
)
def test_each_kind_of_change_has_its_sentence(overrides: dict[str, Any], sentence: str) -> None:
    assert said(**overrides) == [sentence]


@pytest.mark.parametrize(
    "goal",
    [{"max_kl": 0.25}, {"max_perplexity_increase": 0.05}],
)
def test_goals_of_different_kinds_can_be_compared(goal: dict[str, Any]) -> None:
    new = profile(measured={**MEASURED, "target_ratio": None, **goal})
    words = new.measured.goal if new.measured else ""
    assert sentences(profile(), new)[1] == f"The goal was ratio 0.1, and is {words}."
    assert rows(profile(), new) == {
        "measured.target_ratio": ("0.1", None, None),
        f"measured.{next(iter(goal))}": (None, str(next(iter(goal.values()))), None),
    }


@pytest.mark.parametrize(
    ("found", "sentence", "changed"),
    [
        (
            {"candidates": [CANDIDATE], "ratio": 0.2},
            "The searches behind them differ: 2 rules at ratio 0.1 on 2,048 tokens and 1 warm-up → "
            "1 rule at ratio 0.2 on 2,048 tokens and 1 warm-up.",
            {"search.ratio": ("0.1", "0.2", "+0.1"), "search.candidates": ("2 values", "1 values", "1 gone, 0 new")},
        ),
        (
            {"warm_up": [{**TRIAL, "kl": 0.3}]},
            "The searches behind them differ: both tried 2 rules at ratio 0.1 on 2,048 tokens and 1 warm-up.",
            {"search.warm_up": ("1 values", "1 values", "1 gone, 1 new")},
        ),
    ],
)
def test_another_search_is_one_sentence_and_a_row_for_each_list(
    found: dict[str, Any], sentence: str, changed: dict[str, tuple[Any, Any, Any]]
) -> None:
    old, new = profile(search=SEARCH), profile(search={**SEARCH, **found})
    assert sentences(old, new)[1:] == [sentence]
    assert rows(old, new) == changed


def test_a_search_that_only_one_has_is_a_sentence_and_its_lists_are_counted() -> None:
    new = profile(search=SEARCH)
    assert sentences(profile(), new)[1:] == ["Only B has the section `search`."]
    assert rows(profile(), new)["search.candidates"] == (None, "2 values", "0 gone, 2 new")


def test_mixtures_are_compared_by_the_names_of_their_parts() -> None:
    parts = [
        {**{name: TEXT[name] for name in ("config", "split", "revision")}, "dataset": name, "weight": 1.0}
        | {"text_sha256": "f" * 64, "tokens_used": 1024}
        for name in ("wikitext", "c4")
    ]
    evaluation = {**TEXT, "dataset": "mixture", "split": None, "text_sha256": "f" * 64, "parts": parts}
    text, *_ = said(evaluation=evaluation)
    assert text == "B was measured on another text: wikitext:train → a mixture of wikitext:train and c4:train."
    assert rows(profile(), profile(evaluation=evaluation))["evaluation.parts"] == (
        "0 values",
        "2 values",
        "0 gone, 2 new",
    )


def test_figures_of_different_texts_come_after_a_warning() -> None:
    evaluation = {**TEXT, "text_sha256": "f" * 64}
    text, warning, headline, *_ = said(evaluation=evaluation, measured={**MEASURED, "kl": 0.3})
    assert text == "B was measured on other text of wikitext:train."
    assert warning == "So the figures that follow differ by their texts too, not only by the profiles."
    assert headline.startswith("B skips as many")


def test_a_profile_that_lacks_what_the_other_has_is_compared_all_the_same() -> None:
    only = [f"Only B has the section `{name}`." for name in FULL]
    assert sorted(sentences(make_profile(), profile())[1:]) == sorted(only)


def rows(old: Profile, new: Profile) -> dict[str, tuple[Any, Any, Any]]:
    found = [change.row() for change in changes(old, new)]
    return {str(row["field"]): (row["a"], row["b"], row["change"]) for row in found}


def test_every_field_that_differs_is_a_row_in_the_order_of_the_file() -> None:
    new = profile(
        gguf_sha256="f" * 64,
        cold_s=2,
        window=4,
        similarity={**FULL["similarity"], "low": [0.0, 0.0, -0.25, 0.1, 0.0, 0.0]},
        measured={**MEASURED, "kl": 0.3, "within_budget": False, "verdict": "x" * 100, "first_skipped": [0.1] * 6},
        curve=[[0.95, 0.1, 0.2], [0.8, 0.3, 0.6], [0.7, 0.4, 0.9]],
    )
    found = rows(profile(), new)
    assert found == {
        "model.gguf_sha256": (None, "ffffffffffffffff…", None),
        "skip.cold_s": ("1", "2", "+1"),
        "skip.window": (None, "4", None),
        "similarity.low": ("6 values", "6 values", "-0.25 at layer 2"),
        "measured.kl": ("0.2", "0.3", "+0.1"),
        "measured.verdict": ("within the quality budg…", f"{'x' * 23}…", None),
        "measured.within_budget": ("true", "false", None),
        "measured.first_skipped": (None, "6 values", None),
        "curve": ("2 values", "3 values", "1 gone, 2 new"),
    }
    assert list(found) == [
        "model.gguf_sha256",
        "skip.cold_s",
        "skip.window",
        "similarity.low",
        "measured.kl",
        "measured.verdict",
        "measured.within_budget",
        "measured.first_skipped",
        "curve",
    ]


def test_lists_of_models_with_other_numbers_of_layers_have_no_change() -> None:
    smaller = profile(n_layers=5, similarity={"mean": [0.1] * 5, "low": [0.0] * 5, "high": [1.0] * 5})
    assert rows(profile(), smaller)["similarity.mean"] == ("6 values", "5 values", None)
    assert not [sentence for sentence in sentences(profile(), smaller) if "similarity" in sentence]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    save_profile(profile(), a)
    save_profile(profile(threshold=0.85, measured={**MEASURED, "kl": 0.3}), b)
    return a, b


def test_the_page_is_names_sentences_and_a_table(files: tuple[Path, Path]) -> None:
    a, b = files
    result = succeed("diff", a, b)
    names, words, table = result.stdout.rstrip().split("\n\n")
    assert names.splitlines() == [f"A  {a}", f"B  {b}"]
    assert words.splitlines() == sentences(load_profile(a), load_profile(b))
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["skip.threshold", "0.9", "0.85", "-0.05"],
        ["measured.kl", "0.2", "0.3", "+0.1"],
    ]
    assert result.stderr == ""


def test_markdown_is_ready_for_a_pull_request(files: tuple[Path, Path]) -> None:
    a, b = files
    names, words, table = succeed("diff", a, b, "--format", "md").stdout.rstrip().split("\n\n")
    assert names == f"**A** is `{a}`, **B** is `{b}`."
    assert words.splitlines() == [f"- {sentence}" for sentence in sentences(load_profile(a), load_profile(b))]
    assert table.splitlines() == [
        "| field | A | B | change |",
        "|:---|---:|---:|---:|",
        "| skip.threshold | 0.9 | 0.85 | -0.05 |",
        "| measured.kl | 0.2 | 0.3 | +0.1 |",
    ]


def test_json_is_one_document_with_values_in_full(files: tuple[Path, Path]) -> None:
    a, b = files
    document = json.loads(succeed("diff", a, b, "--format", "json").stdout)
    assert document == {
        "schema": "ffnskip-diff/v1",
        "a": str(a),
        "b": str(b),
        "identical": False,
        "sentences": sentences(load_profile(a), load_profile(b)),
        "changes": [
            {"field": "skip.threshold", "a": 0.9, "b": 0.85, "change": pytest.approx(-0.05), "layer": None},
            {"field": "measured.kl", "a": 0.2, "b": 0.3, "change": pytest.approx(0.1), "layer": None},
        ],
    }


def test_a_difference_too_large_for_a_number_is_still_json(tmp_path: Path) -> None:
    for name, threshold in (("a", -1.7e308), ("b", 1.7e308)):
        save_profile(profile(threshold=threshold), tmp_path / name)
    document = json.loads(succeed("diff", tmp_path / "a", tmp_path / "b", "--format", "json").stdout)
    assert document["changes"][0]["change"] is None


def test_identical_profiles_have_no_table(files: tuple[Path, Path]) -> None:
    a, _ = files
    assert succeed("diff", a, a).stdout == f"A  {a}\nB  {a}\n\nThe profiles are identical.\n\n"
    document = json.loads(succeed("diff", a, a, "--format", "json").stdout)
    assert (document["identical"], document["changes"]) == (True, [])


@pytest.mark.parametrize("format", ["table", "md", "json"])
def test_the_exit_code_tells_of_a_difference_only_when_asked(files: tuple[Path, Path], format: str) -> None:
    a, b = files
    assert run("diff", a, b, "--format", format).exit_code == 0
    assert run("diff", a, b, "--format", format, "--exit-code").exit_code == 1
    assert run("diff", a, a, "--format", format, "--exit-code").exit_code == 0


def test_a_file_that_is_no_profile_is_a_sentence(files: tuple[Path, Path], tmp_path: Path) -> None:
    a, _ = files
    assert mistake("diff", a, tmp_path / "none.yaml").startswith(f"{tmp_path / 'none.yaml'}: cannot be read")
    (tmp_path / "broken.yaml").write_text("skip: 5")
    assert mistake("diff", tmp_path / "broken.yaml", a).startswith(f"{tmp_path / 'broken.yaml'}: ")


def compensated(kind: Kind = "mean", **overrides: Any) -> Profile:
    return make_compensated(kind, **{"rule": "predicted-damage", "threshold": 0.01, **overrides})


def test_profiles_with_one_weights_file_are_said_to_share_it_and_thresholds_have_their_unit() -> None:
    old, new = compensated(), compensated(threshold=0.02)
    assert sentences(old, new)[1:] == [
        "The threshold rose from 0.01 to 0.02 nats.",
        f"They share one weights file, {old.compensation.file}.",
    ]
    assert rows(old, new) == {"skip.threshold": ("0.01", "0.02", "+0.01")}


def test_another_compensation_is_named_with_the_file_of_its_weights() -> None:
    old, new = compensated(), compensated("low-rank", rank=3, neurons=4)
    assert sentences(old, new)[1:] == [
        "What is added in place of a skipped FFN: mean → low-rank 3 + 4 neurons.",
        f"Their weights differ: {old.compensation.file} → {new.compensation.file}.",
    ]
    assert list(rows(old, new)) == [f"compensation.{name}" for name in ("kind", "rank", "neurons", "file", "sha256")]


def test_the_same_weights_under_another_name_are_not_said_to_differ() -> None:
    old = compensated()
    renamed = old.compensation.model_copy(update={"file": "shared.safetensors"})
    assert sentences(old, old.model_copy(update={"compensation": renamed}))[1:] == [
        f"Their weights are the same, in files of two names: {old.compensation.file} → shared.safetensors."
    ]


def test_thresholds_of_two_rules_are_not_compared() -> None:
    old, new = make_profile(window=2), compensated()
    assert sentences(old, new)[1:] == [
        "The rule was cosine with a threshold of 0.9, and is predicted-damage with a threshold of 0.01 nats.",
        "What is added in place of a skipped FFN: none → mean.",
    ]
    assert rows(old, new)["skip.threshold"] == ("0.9", "0.01", None)


FIT = {"tokens": 4096, "text_sha256": "c" * 64, "gradient_tokens": 512, "ridge": 0.001, "ratio": 0.25, "kl": [0.2, 0.1]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"kl": [0.2, 0.05], "tokens": 8192},
            "The fits behind them differ: 4,096 tokens and 1 refit to KL 0.1 at ratio 0.25 → "
            "8,192 tokens and 1 refit to KL 0.05 at ratio 0.25.",
        ),
        (
            {"ridge": 0.01},
            "The fits behind them differ: both had 4,096 tokens and 1 refit to KL 0.1 at ratio 0.25.",
        ),
    ],
)
def test_another_fit_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    old, new = compensated(fit=FIT), compensated(fit={**FIT, **change})
    assert sentences(old, new)[1:] == [f"They share one weights file, {old.compensation.file}.", sentence]
    assert rows(old, new).get("fit.kl", ("2 values", "2 values", None)) == ("2 values", "2 values", None)


def test_a_search_for_a_warm_up_alone_is_not_said_to_have_tried_rules() -> None:
    search = {"ratio": 0.25, "tokens": 0, "warm_up": [TRIAL]}
    old, new = compensated(search=search), compensated(search={**search, "warm_up": [TRIAL, TRIAL]})
    assert sentences(old, new)[-1] == (
        "The searches behind them differ: 1 warm-up at ratio 0.25 → 2 warm-ups at ratio 0.25."
    )


def test_the_command_reads_both_profiles_with_the_weights_that_they_share(tmp_path: Path) -> None:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    for path, threshold in ((a, 0.01), (b, 0.02)):
        save_profile(compensated(threshold=threshold), path)
    weights = compensated().compensation.file
    assert f"They share one weights file, {weights}." in succeed("diff", a, b).stdout.splitlines()
    (tmp_path / str(weights)).unlink()
    assert mistake("diff", a, b).startswith(f"{tmp_path / str(weights)}: cannot be read")
