"""A profile in sentences: each states what the profile holds, and none is there without it."""

from typing import Any

import pytest
from support import factories
from support.factories import TEXT, Kind, make_compensated, make_profile
from support.sentences import numbers

from ffnskip.errors import FfnskipError
from ffnskip.profiles.profile import Profile
from ffnskip_cli.budget import MAX_KL
from ffnskip_cli.report.words import explain

CALIBRATION = {**factories.CALIBRATION, "tokens_used": 4096}
UNSEEN = {**TEXT, "split": "test", "text_sha256": "b" * 64, "tokens_used": 2048}
MEASURED = {**factories.MEASURED, "skip_ratio": 0.1014, "tokens": 1840}
ERRORS = {"skip_ratio": 0.0036, "kl": 0.0125, "perplexity": 0.52, "top1_agreement": 0.012}
FIT = {"tokens": 98304, "text_sha256": "c" * 64, "gradient_tokens": 24576, "ridge": 0.001, "ratio": 0.25}


def only(words: str, profile: Profile) -> str:
    """The one sentence of a profile that holds these words."""
    (sentence,) = [sentence for sentence in explain(profile) if words in sentence]
    return sentence


def damage(kind: Kind = "mean", **overrides: Any) -> Profile:
    return make_compensated(kind, rule="predicted-damage", **overrides)


@pytest.mark.parametrize("profile", [make_profile(window=3), damage(threshold=0.0125)], ids=["cosine", "damage"])
def test_the_first_sentence_is_the_rules(profile: Profile) -> None:
    assert explain(profile)[0] == profile.skip.by.sentence(profile.skip, "layers 1 to 4")
    assert f"{profile.skip.threshold:g}" in numbers(explain(profile)[0])


@pytest.mark.parametrize(
    ("rule", "stated"),
    [
        ({}, [["1", "4", "0.9"], ["0", "5"], ["2"]]),
        ({"window": 1}, [["1", "4", "0.9"], ["0", "5"], ["2"]]),
        ({"window": 3}, [["1", "4", "0.9", "3"], ["0", "5"], ["2"]]),
        ({"cold_s": 0, "cold_e": 3}, [["0", "2", "0.9"], ["3", "5"], ["2"]]),
        ({"cold_s": 0, "cold_e": 6}, [["0", "5", "0.9"], ["2"]]),
        ({"warm_up": 1}, [["1", "4", "0.9"], ["0", "5"], []]),
        ({"warm_up": 0, "refresh_every": 6}, [["1", "4", "0.9"], ["0", "5"], ["6"]]),
    ],
)
def test_each_setting_of_the_rule_is_stated(rule: dict[str, Any], stated: list[list[str]]) -> None:
    sentences = explain(make_profile(**rule))
    assert [numbers(sentence) for sentence in sentences] == stated
    assert ("cold regions" in " ".join(sentences)) is (len(stated) == 3)
    assert ("warm-up" in sentences[-1]) is (rule.get("warm_up") != 0)


@pytest.mark.parametrize("rule", ["predicted-damage", "cosine"])
@pytest.mark.parametrize(
    ("kind", "size", "stated"),
    [
        ("mean", {}, []),
        ("linear", {}, []),
        ("linear", {"neurons": 1}, ["1"]),
        ("low-rank", {"rank": 3, "neurons": 4}, ["3", "4"]),
    ],
)
def test_a_compensation_is_stated_with_its_size_and_its_file(
    kind: Kind, size: dict[str, int], stated: list[str], rule: str
) -> None:
    profile = make_compensated(kind, rule=rule, **size)
    added, _, where = explain(profile)[1].partition(" is added; ")
    assert numbers(added) == stated
    assert str(profile.compensation.file) in where
    probes_alone = damage("none")
    assert "nothing is added" in only(str(probes_alone.compensation.file), probes_alone)


@pytest.mark.parametrize(
    ("kl", "stated", "kept"),
    [
        ([], [], False),
        ([0.0712], ["0.25", "0.0712"], False),
        ([0.0712, 0.08], ["0.25", "0.0712", "0.08"], True),
        ([0.0712, 0.05, 0.04], ["0.25", "0.0712", "0.05", "0.04"], False),
        ([0.0712, 0.05, 0.04, 0.041], ["0.25", "0.0712", "0.05", "0.04", "0.041"], True),
    ],
)
def test_the_course_of_the_fit_is_one_sentence(kl: list[float], stated: list[str], kept: bool) -> None:
    sentence = only("fitted to", damage(fit={**FIT, "kl": kl}))
    assert numbers(sentence) == ["98,304", *stated]
    assert ("the best was kept" in sentence) is kept


@pytest.mark.parametrize(
    ("kind", "rule", "start"),
    [
        ("none", "predicted-damage", "The probes were"),
        ("mean", "cosine", "The compensation was"),
        ("mean", "predicted-damage", "Probes and compensation were"),
    ],
)
def test_only_what_the_profile_has_is_said_to_be_fitted(kind: Kind, rule: str, start: str) -> None:
    assert explain(make_compensated(kind, rule=rule, fit={**FIT, "kl": [0.1]}))[-1].startswith(start)


def test_a_compensation_that_was_chosen_is_compared_with_the_others() -> None:
    tried = [
        {"kind": "mean", "rank": None, "neurons": 0, "skip_ratio": 0.1, "flops_saved": 0.04},
        {"kind": "low-rank", "rank": 3, "neurons": 4, "skip_ratio": 0.2, "flops_saved": 0.081},
    ]
    fit = {**FIT, "kl": [0.1], "tried": tried}
    sentence = only("tried", make_compensated("low-rank", rank=3, neurons=4, fit=fit))
    assert numbers(sentence) == ["2", "3", "4", "8.1"]
    assert not [said for said in explain(make_compensated("linear", fit=fit)) if "tried" in said]


KL = {"target_ratio": None, "max_kl": 0.25}
PERPLEXITY = {"target_ratio": None, "max_perplexity_increase": 0.35}


@pytest.mark.parametrize(
    ("figures", "stated"),
    [
        ({}, ["0.1", "1,840", "0.101", "0.004"]),
        (KL, ["0.25", "1,840", "0.200", "0.013", "0.101", "0.004"]),
        (PERPLEXITY, ["35", "1,840", "30", "0.101", "0.004"]),
        ({**PERPLEXITY, "perplexity": 6.3}, ["35", "1,840", "10", "0.101", "0.004"]),
        ({**PERPLEXITY, "perplexity_dense": 0.0}, ["35", "1,840", "0.101", "0.004"]),
    ],
)
def test_the_goal_is_followed_by_what_was_reached(figures: dict[str, Any], stated: list[str]) -> None:
    measured = {**MEASURED, "standard_error": ERRORS, **figures}
    profile = make_profile(calibration=CALIBRATION, evaluation=UNSEEN, measured=measured)
    goal = only("The goal was", profile)
    assert f"The goal was {profile.measured.goal};" in goal
    assert numbers(goal) == stated
    assert ("limit was made to hold on this very text" in goal) is bool(figures)
    assert ("% down" in goal) is (figures.get("perplexity") == 6.3)


@pytest.mark.parametrize(
    ("texts", "unseen"),
    [
        ({"calibration": CALIBRATION, "evaluation": UNSEEN}, True),
        ({"calibration": CALIBRATION, "evaluation": TEXT}, False),
        ({"evaluation": UNSEEN}, False),
        ({}, False),
    ],
)
def test_text_is_called_unseen_only_if_the_profile_shows_it(texts: dict[str, Any], unseen: bool) -> None:
    assert ("unseen text" in only("The goal was", make_profile(measured=MEASURED, **texts))) is unseen


@pytest.mark.parametrize(
    ("figures", "words", "stated"),
    [
        ({}, "It saves", ["5.2"]),
        ({"flops_saved": -0.031}, "more FLOPs", ["3.1"]),
        ({}, "skip no FFN at all", ["40.0"]),
        ({"never_skip_fraction": 0.0}, "Every token past the warm-up skips", []),
        ({}, "It costs KL", ["0.200", "7", "9.1", "90.0", "1"]),
        ({"standard_error": ERRORS}, "It costs KL", ["0.200", "0.013", "7", "9.1", "0.52", "90.0", "1.2", "1"]),
        ({}, "Verdict: within the quality budget.", []),
        ({"verdict": "not worth it."}, "Verdict: not worth it.", []),
    ],
)
def test_savings_costs_and_verdict_are_stated(figures: dict[str, Any], words: str, stated: list[str]) -> None:
    sentence = only(words, make_profile(measured={**MEASURED, **figures}))
    assert numbers(sentence) == stated
    assert sentence.count("±") == (3 if "±" in sentence else 0)


def part(dataset: str, tokens: int) -> dict[str, Any]:
    fields = ("config", "split", "revision", "text_sha256")
    return {**{name: TEXT[name] for name in fields}, "dataset": dataset, "weight": 1.0, "tokens_used": tokens}


def mixed(text: dict[str, Any], *parts: dict[str, Any]) -> dict[str, Any]:
    return {**text, "dataset": "mixture", "split": None, "parts": list(parts)}


THREE = [part("wikitext", 2048), part("c4", 1024), part("gsm8k", 1024)]
TWO_KINDS = mixed(UNSEEN, part("wikitext", 1536), part("c4", 512))
NAMES_OF_THREE = "a mixture of wikitext:train (2,048), c4:train (1,024) and gsm8k:train (1,024)"
ONE_KIND, IN_PART, ANOTHER, VERY_SAME = "text of one kind", "only in part", "text of another kind", "the very same text"


@pytest.mark.parametrize(
    ("calibration", "evaluation", "named", "relation"),
    [
        (CALIBRATION, UNSEEN, "2,048 tokens of wikitext:test", ONE_KIND),
        (CALIBRATION, {**UNSEEN, "dataset": "c4", "config": "en"}, "2,048 tokens of c4:en:test", ANOTHER),
        (CALIBRATION, {**UNSEEN, "config": "103"}, "wikitext:103:test", IN_PART),
        (CALIBRATION, TWO_KINDS, "a mixture of wikitext:train (1,536) and c4:train (512)", IN_PART),
        (CALIBRATION, {**UNSEEN, "text_sha256": TEXT["text_sha256"]}, "wikitext:test", VERY_SAME),
        (mixed(CALIBRATION, *THREE), mixed(UNSEEN, *THREE[::-1]), NAMES_OF_THREE, "the same kinds of text"),
    ],
)
def test_both_texts_are_named_and_said_to_be_of_one_kind_or_not(
    calibration: dict[str, Any], evaluation: dict[str, Any], named: str, relation: str
) -> None:
    sentence = only("calibrated on", make_profile(calibration=calibration, evaluation=evaluation))
    assert "4,096 tokens of" in sentence
    assert named in sentence
    assert relation in sentence.rpartition(": ")[2]


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        ({"calibration": CALIBRATION}, "calibrated on 4,096 tokens of wikitext:train."),
        ({"calibration": {**CALIBRATION, "on": "generated"}}, "the model itself wrote on from wikitext:train."),
        ({"evaluation": UNSEEN}, "measured on 2,048 tokens of wikitext:test."),
    ],
)
def test_a_text_alone_is_named(texts: dict[str, Any], named: str) -> None:
    assert explain(make_profile(**texts))[-1].endswith(named)


@pytest.mark.parametrize("ends", [(0.02636, 0.18565), (0.07, 0.29), (0.1, 0.1234), (0.1011, 0.1019)])
def test_target_takes_both_ends_of_the_range_that_is_promised(ends: tuple[float, float]) -> None:
    profile = make_profile(curve=[[0.99, ends[0], 0.3], [0.98, ends[1], 0.5]])
    low, high = map(float, numbers(only("--target", profile)))
    for said, end, beyond in zip((low, high), ends, (-0.01, 0.01), strict=True):
        assert said == pytest.approx(end, abs=0.01)
        assert profile.point_at(said).skip_ratio == said
        if said != end:
            with pytest.raises(FfnskipError):
                profile.point_at(said + beyond)


@pytest.mark.parametrize(
    "profile",
    [
        make_profile(curve=[[0.97, 0.3, 0.14], [0.98, 0.2, 0.07], [0.99, 0.1, 0.02]]),
        damage(curve=[[0.03, 0.3, 0.14], [0.02, 0.2, 0.07], [0.01, 0.2, 0.07], [0.005, 0.1, 0.02]]),
    ],
    ids=["falling", "rising"],
)
def test_the_quality_budget_lies_where_the_curve_has_its_kl(profile: Profile) -> None:
    assert numbers(only("--target", profile)) == ["0.1", "0.3"]
    assert numbers(only("On its curve", profile)) == ["0.05", "0.16", "1"]
    assert profile.point_at(0.16).kl == pytest.approx(MAX_KL)


def test_without_a_curve_there_is_no_range_and_without_one_that_crosses_the_budget_no_ratio_of_it() -> None:
    for curve in ([], [[0.99, 0.1, 0.3]]):
        assert explain(make_profile(curve=curve)) == explain(make_profile())
    for low, high in ((0.01, 0.02), (0.3, 0.5)):
        sentences = explain(make_profile(curve=[[0.99, 0.1, low], [0.98, 0.2, high]]))
        assert not [sentence for sentence in sentences if "budget" in sentence]
