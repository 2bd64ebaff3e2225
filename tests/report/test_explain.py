"""A profile in sentences: each says what its numbers say, and none is there without them."""

import re
from typing import Any

import pytest
from support.factories import Kind, make_compensated, make_profile

from ffnskip.errors import FfnskipError
from ffnskip_cli.budget import MAX_KL
from ffnskip_cli.report.explain import explain

TEXT = {
    "dataset": "wikitext",
    "config": None,
    "split": "train",
    "revision": None,
    "text_sha256": "a" * 64,
    "tokens_requested": 4096,
    "tokens_used": 4096,
    "sequence_length": 256,
}
BUDGET_AT_016 = (
    "On its curve, KL 0.25 lies at a ratio of about 0.16. That is the limit on KL alone: the quality budget has one on "
    "top-1 agreement, too, of which a curve says nothing."
)
CALIBRATION = {**TEXT, "seed": 0, "dtype": "bfloat16", "on": "text"}
UNSEEN = {**TEXT, "split": "test", "text_sha256": "b" * 64, "tokens_used": 2048}
MEASURED = {
    "target_ratio": 0.1,
    "skip_ratio": 0.1014,
    "flops_saved": 0.0523,
    "never_skip_fraction": 0.4,
    "perplexity_dense": 7.0,
    "perplexity": 9.1,
    "kl": 0.2,
    "top1_agreement": 0.9,
    "tokens": 1840,
    "standard_error": {},
    "verdict": "within the quality budget",
    "within_budget": True,
}


def only(words: str, **overrides: Any) -> str:
    """The one sentence of a profile that holds these words."""
    (sentence,) = [sentence for sentence in explain(make_profile(**overrides)) if words in sentence]
    return sentence


def test_a_profile_with_a_rule_only_has_its_rule_explained_and_nothing_else() -> None:
    assert explain(make_profile()) == [
        "In layers 1 to 4, once a feed-forward block (FFN) turns a token's residual stream so little that "
        "cos(h, h + FFN(h)) is at least 0.9, all later FFNs of these layers are skipped for this token.",
        "The FFNs of layer 0 and layer 5 (the cold regions) always run.",
        "The prompt and the first 2 generated tokens (the warm-up) run dense.",
    ]


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ({"window": 1}, "at least 0.9, the next FFN is skipped for this token."),
        ({"window": 3}, "at least 0.9, the next 3 FFNs of these layers are skipped for this token."),
        ({"cold_s": 0, "cold_e": 3}, "The FFNs of layers 3 to 5 (the cold regions) always run."),
        ({"warm_up": 1}, "The prompt and the first generated token (the warm-up) run dense."),
        ({"warm_up": 0, "refresh_every": 6}, "The prompt runs dense; after that, one token in 6 runs dense."),
    ],
)
def test_each_setting_of_the_rule_is_said(rule: dict[str, Any], sentence: str) -> None:
    assert [said for said in explain(make_profile(**rule)) if said.endswith(sentence)]


def test_without_cold_regions_none_is_named() -> None:
    assert not [said for said in explain(make_profile(cold_s=0, cold_e=6)) if "cold" in said]


def test_a_predicted_damage_is_explained_by_its_probes_and_without_similarities() -> None:
    profile = make_compensated("low-rank", rule="predicted-damage", rank=3, neurons=4, threshold=0.0125)
    assert explain(profile) == [
        "In layers 1 to 4, each feed-forward block (FFN) is skipped for a token when a probe on the FFN's own input "
        "predicts that this does less than 0.0125 nats of damage.",
        "In place of a skipped FFN's output an affine map of rank 3 of the FFN's input plus 4 neurons of the FFN's own "
        f"is added; the weights lie in the file {profile.compensation.file} beside the profile.",
        "The FFNs of layer 0 and layer 5 (the cold regions) always run.",
        "The prompt and the first 2 generated tokens (the warm-up) run dense.",
    ]


@pytest.mark.parametrize("rule", ["predicted-damage", "cosine"])
@pytest.mark.parametrize(
    ("kind", "neurons", "words"),
    [
        ("mean", 0, "output its mean is added; the weights lie"),
        ("linear", 0, "output a linear map of the FFN's input is added; the weights lie"),
        (
            "linear",
            1,
            "output a linear map of the FFN's input plus 1 neuron of the FFN's own is added; the weights lie",
        ),
    ],
)
def test_each_compensation_is_named_with_the_file_of_its_weights(
    kind: Kind, neurons: int, rule: str, words: str
) -> None:
    profile = make_compensated(kind, rule=rule, neurons=neurons)
    (sentence,) = [said for said in explain(profile) if words in said]
    assert sentence.endswith(f"in the file {profile.compensation.file} beside the profile.")


def test_probes_without_a_compensation_have_a_file_too() -> None:
    profile = make_compensated("none", rule="predicted-damage", cold_s=0, cold_e=6)
    assert explain(profile)[1:] == [
        "In place of a skipped FFN's output nothing is added; the probes' weights lie in the file "
        f"{profile.compensation.file} beside the profile.",
        "The prompt and the first 2 generated tokens (the warm-up) run dense.",
    ]


FIT = {"tokens": 98304, "text_sha256": "c" * 64, "gradient_tokens": 24576, "ridge": 0.001, "ratio": 0.25}
FITTED = "fitted to 98,304 tokens of the calibration text's datasets"
AT_25 = f"{FITTED}: at a ratio of 0.25, on text that was held back, KL was 0.0712 after the dense fit"


@pytest.mark.parametrize(
    ("kl", "end"),
    [
        ([], f"{FITTED}."),
        ([0.0712], f"{AT_25}."),
        ([0.0712, 0.08], f"{AT_25}, and 0.08 after the refit to the skipping model; the best was kept."),
        ([0.0712, 0.05, 0.04], f"{AT_25}, and 0.05 and 0.04 after the refits to the skipping model."),
        (
            [0.0712, 0.05, 0.04, 0.041],
            f"{AT_25}, and 0.05, 0.04 and 0.041 after the refits to the skipping model; the best was kept.",
        ),
    ],
)
def test_the_course_of_the_fit_is_one_sentence(kl: list[float], end: str) -> None:
    profile = make_compensated("mean", rule="predicted-damage", fit={**FIT, "kl": kl})
    assert explain(profile)[-1] == f"Probes and compensation were {end}"


@pytest.mark.parametrize(
    ("kind", "rule", "start"),
    [("none", "predicted-damage", "The probes were fitted"), ("mean", "cosine", "The compensation was fitted")],
)
def test_only_what_the_profile_has_is_said_to_be_fitted(kind: Kind, rule: str, start: str) -> None:
    assert explain(make_compensated(kind, rule=rule, fit={**FIT, "kl": [0.1]}))[-1].startswith(start)


TRIED = [
    {"kind": "mean", "rank": None, "neurons": 0, "skip_ratio": 0.1, "flops_saved": 0.04},
    {"kind": "low-rank", "rank": 3, "neurons": 4, "skip_ratio": 0.2, "flops_saved": 0.081},
]


def test_a_compensation_that_was_chosen_is_compared_with_the_others() -> None:
    fit = {**FIT, "kl": [0.1], "tried": TRIED}
    assert explain(make_compensated("low-rank", rank=3, neurons=4, fit=fit))[-2] == (
        "Of 2 compensations tried, low-rank 3 + 4 neurons saves most at the KL that is allowed: 8.1% of a token's "
        "FLOPs, estimated from dense fits on text that was held back."
    )
    assert not [said for said in explain(make_compensated("linear", fit=fit)) if "tried" in said]


GOALS: list[tuple[dict[str, Any], str]] = [
    ({}, "The goal was ratio 0.1; past the warm-up, 1,840 tokens of unseen text gave a ratio of 0.101 ± 0.004 "),
    (
        {"target_ratio": None, "max_kl": 0.25},
        "The goal was KL at most 0.25; past the warm-up, 1,840 tokens of unseen text gave KL 0.200 ± 0.013 at a ratio "
        "of 0.101 ± 0.004 ",
    ),
    (
        {"target_ratio": None, "max_perplexity_increase": 0.35},
        "The goal was perplexity at most 35% up; past the warm-up, 1,840 tokens of unseen text gave perplexity 30% up "
        "at a ratio of 0.101 ± 0.004 ",
    ),
    (
        {"target_ratio": None, "max_perplexity_increase": 0.35, "perplexity": 6.3},
        "The goal was perplexity at most 35% up; past the warm-up, 1,840 tokens of unseen text gave perplexity 10% "
        "down at a ratio of 0.101 ± 0.004 ",
    ),
    (
        {"target_ratio": None, "max_perplexity_increase": 0.35, "perplexity_dense": 0.0},
        "The goal was perplexity at most 35% up; past the warm-up, 1,840 tokens of unseen text gave a ratio of "
        "0.101 ± 0.004 ",
    ),
]


@pytest.mark.parametrize(("figures", "start"), GOALS)
def test_what_was_asked_for_is_followed_by_what_was_reached(figures: dict[str, Any], start: str) -> None:
    measured = {**MEASURED, "standard_error": {"skip_ratio": 0.0036, "kl": 0.0125}, **figures}
    goal = only("The goal was", calibration=CALIBRATION, evaluation=UNSEEN, measured=measured)
    held = " The limit was made to hold on this very text." if "target_ratio" in figures else ""
    assert goal == f"{start}(skipped FFNs / all FFNs; ± is one standard error).{held}"


@pytest.mark.parametrize("texts", [{}, {"calibration": CALIBRATION, "evaluation": TEXT}, {"evaluation": UNSEEN}])
def test_text_is_called_unseen_only_if_the_profile_shows_it(texts: dict[str, Any]) -> None:
    assert only("The goal was", measured=MEASURED, **texts) == (
        "The goal was ratio 0.1; past the warm-up, 1,840 tokens of text gave a ratio of 0.101 "
        "(skipped FFNs / all FFNs)."
    )


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        ({}, "It saves 5.2% of a decode's FLOPs, warm-up and all overhead charged."),
        ({"flops_saved": -0.031}, "It costs 3.1% more FLOPs in a decode, warm-up and all overhead charged."),
        ({}, "The worst case saves nothing: 40.0% of the tokens past the warm-up skip no FFN at all."),
        ({"never_skip_fraction": 0.0}, "Every token past the warm-up skips at least one FFN."),
        (
            {"standard_error": {"kl": 0.01, "perplexity": 0.52, "top1_agreement": 0.012}},
            "It costs KL 0.200 ± 0.010 nats per token from the dense model: perplexity goes from 7 to 9.1 ± 0.52, and "
            "the most likely token is the same at 90.0% ± 1.2% of positions (top-1 agreement).",
        ),
        (
            {},
            "It costs KL 0.200 nats per token from the dense model: perplexity goes from 7 to 9.1, and "
            "the most likely token is the same at 90.0% of positions (top-1 agreement).",
        ),
        ({}, "Verdict: within the quality budget."),
        ({"verdict": "not worth it."}, "Verdict: not worth it."),
    ],
)
def test_savings_costs_and_verdict_are_said_with_their_numbers(figures: dict[str, Any], sentence: str) -> None:
    assert sentence in explain(make_profile(measured={**MEASURED, **figures}))


def part(dataset: str, tokens: int) -> dict[str, Any]:
    fields = ("config", "split", "revision", "text_sha256")
    return {**{name: TEXT[name] for name in fields}, "dataset": dataset, "weight": 1.0, "tokens_used": tokens}


def mixed(text: dict[str, Any], *parts: dict[str, Any]) -> dict[str, Any]:
    return {**text, "dataset": "mixture", "split": None, "parts": list(parts)}


ON_BOTH = "It was calibrated on 4,096 tokens of wikitext:train and measured on 2,048 tokens of"


@pytest.mark.parametrize(
    ("evaluation", "sentence"),
    [
        (UNSEEN, f"{ON_BOTH} wikitext:test: text of one kind, so the figures say nothing about others."),
        ({**UNSEEN, "dataset": "c4", "config": "en"}, f"{ON_BOTH} c4:en:test: text of another kind."),
        (
            {**UNSEEN, "config": "103"},
            f"{ON_BOTH} wikitext:103:test: texts that share a dataset only in part.",
        ),
        (
            mixed(UNSEEN, part("wikitext", 1536), part("c4", 512)),
            f"{ON_BOTH} a mixture of wikitext:train (1,536) and c4:train (512): texts that share a dataset only in "
            "part.",
        ),
        (
            {**UNSEEN, "text_sha256": TEXT["text_sha256"]},
            f"{ON_BOTH} wikitext:test: the very same text, so the figures are not those of unseen text.",
        ),
    ],
)
def test_the_texts_are_named_and_said_to_be_of_one_kind_or_not(evaluation: dict[str, Any], sentence: str) -> None:
    assert only("calibrated on", calibration=CALIBRATION, evaluation=evaluation) == sentence


def test_two_like_mixtures_are_of_the_same_kinds_in_any_order() -> None:
    calibration = mixed(CALIBRATION, part("wikitext", 2048), part("c4", 1024), part("gsm8k", 1024))
    evaluation = mixed(UNSEEN, part("c4", 600), part("gsm8k", 600), part("wikitext", 848))
    sentence = only("calibrated on", calibration=calibration, evaluation=evaluation)
    assert "a mixture of wikitext:train (2,048), c4:train (1,024) and gsm8k:train (1,024) and measured" in sentence
    assert sentence.endswith(": the same kinds of text, so the figures say nothing about others.")


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ({"calibration": CALIBRATION}, "It was calibrated on 4,096 tokens of wikitext:train."),
        (
            {"calibration": {**CALIBRATION, "on": "generated"}},
            "It was calibrated on what the model itself wrote on from wikitext:train.",
        ),
        ({"evaluation": UNSEEN}, "It was measured on 2,048 tokens of wikitext:test."),
    ],
)
def test_a_text_alone_is_named(texts: dict[str, Any], sentence: str) -> None:
    assert explain(make_profile(**texts))[-1] == sentence


@pytest.mark.parametrize("ends", [(0.02636, 0.18565), (0.07, 0.29), (0.1, 0.1234), (0.1011, 0.1019)])
def test_target_takes_both_ends_of_the_range_that_is_promised(ends: tuple[float, float]) -> None:
    profile = make_profile(curve=[[0.99, ends[0], 0.3], [0.98, ends[1], 0.5]])
    match = re.fullmatch(
        r"--target moves the ratio between (\S+) and (\S+) without a new calibration\.", explain(profile)[-1]
    )
    assert match
    for said, end in zip(map(float, match.groups()), ends, strict=True):
        assert said == pytest.approx(end, abs=0.01)
        assert profile.point_at(said).skip_ratio == said
        if said != end:
            with pytest.raises(FfnskipError):
                profile.point_at(said + (0.01 if end == ends[1] else -0.01))


@pytest.mark.parametrize("curve", [[], [[0.99, 0.1, 0.3]]])
def test_there_is_no_range_without_a_curve(curve: list[list[float]]) -> None:
    assert explain(make_profile(curve=curve)) == explain(make_profile())


def test_the_quality_budget_lies_where_the_curve_has_its_kl() -> None:
    profile = make_profile(curve=[[0.97, 0.3, 0.7], [0.98, 0.2, 0.35], [0.99, 0.1, 0.1]])
    sentence = explain(profile)[-1]
    assert sentence == BUDGET_AT_016
    assert profile.point_at(0.16).kl == pytest.approx(MAX_KL)


def test_a_curve_whose_thresholds_rise_with_the_ratio_is_read_like_any_other() -> None:
    curve = [[0.03, 0.3, 0.7], [0.02, 0.2, 0.35], [0.01, 0.2, 0.35], [0.005, 0.1, 0.1]]
    profile = make_compensated("mean", rule="predicted-damage", threshold=0.01, curve=curve)
    assert explain(profile)[-2:] == [
        "--target moves the ratio between 0.1 and 0.3 without a new calibration.",
        BUDGET_AT_016,
    ]


@pytest.mark.parametrize("kls", [(0.1, 0.2), (0.3, 0.5)])
def test_a_curve_that_does_not_cross_the_budget_has_no_such_ratio(kls: tuple[float, float]) -> None:
    sentences = explain(make_profile(curve=[[0.99, 0.1, kls[0]], [0.98, 0.2, kls[1]]]))
    assert not [sentence for sentence in sentences if "budget" in sentence]
