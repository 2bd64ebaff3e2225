"""The rows of a benchmark: which figures each part fills in, and where they come from."""

import json
from functools import cache
from itertools import combinations
from typing import Any

import pytest
from support.calibrations import quality_of
from support.pico import float64_model, middle_threshold, pico_profile, pico_tokens
from torch import Tensor

from ffnskip import Decoder, Profile, SkipStats
from ffnskip_cli.bench.suite import PARTS, Plan, run_suite
from ffnskip_cli.measure.flops import model_cost, overhead
from ffnskip_cli.measure.worst_case import continue_prompts
from ffnskip_cli.progress import silently

MODEL = float64_model()
TEXT, TIMED = pico_tokens(16, batch=3), pico_tokens(15, batch=2, seed=1)
PROMPT, NEW, REPETITIONS, PROMPTS = 6, 9, 3, 2
FIELDS = {
    "quality": {
        *("skip_ratio", "flops_per_token", "flops_saved", "flops_saved_past_warm_up"),
        *("perplexity", "kl", "kl_reverse", "kl_percentiles", "top1_agreement", "standard_error"),
    },
    "speed": {"tokens_per_second", "speedup", "ceiling", "decode_skip_ratio", "first_token_seconds", "prompt_share"},
    "worst-case": {"never_skip_fraction", "repetition"},
    "layers": {"kl_by_layer"},
}
OPPONENTS = ("random", "static", "shortgpt", "teal")
SOME_PARTS = [
    frozenset(parts)
    for size in range(1, len(PARTS) + 1)
    for parts in combinations(PARTS, size)
    if "quality" in parts or not {"opponents", "layers"} & set(parts)
]


@cache
def profile() -> Profile:
    return pico_profile(MODEL, threshold=round(middle_threshold(MODEL, TEXT), 3), warm_up=2)


@cache
def rows(parts: frozenset[str], timed_on: str = "generated") -> dict[str, dict[str, Any]]:
    plan = Plan(parts, PROMPT, NEW, REPETITIONS, PROMPTS, OPPONENTS)
    timed_text = TIMED if timed_on == "text" else None
    decoder = Decoder(MODEL, profile())
    return {row["name"]: row for row in run_suite(MODEL, decoder, TEXT, plan, silently, timed_text=timed_text)}


@pytest.mark.parametrize("parts", SOME_PARTS, ids=lambda parts: "+".join(sorted(parts)))
def test_what_was_not_measured_is_none_and_everything_else_is_there(parts: frozenset[str]) -> None:
    found = rows(parts)
    others = (["hf-dense"] if "speed" in parts else []) + ([*OPPONENTS] if "opponents" in parts else [])
    assert list(found) == ["dense", "ffnskip", *others]
    measured = set().union(*(FIELDS[part] for part in parts - {"opponents"}))
    only = {"hf-dense": FIELDS["speed"], **dict.fromkeys(OPPONENTS, FIELDS["quality"])}
    only["dense"] = measured - FIELDS["layers"]
    for name, row in found.items():
        own = measured & only.get(name, measured)
        found_here = {field for field, value in row.items() if value is not None}
        assert found_here - {"least_skipped"} == {"name", *own}  # which teal's row has
        # The general path does not measure a breakdown.
        assert set(row) == {"name", "missing", "breakdown", "least_skipped"}.union(*FIELDS.values())
    json.dumps(found, allow_nan=False)


def test_the_dense_row_skips_nothing_by_definition() -> None:
    dense = rows(frozenset(PARTS))["dense"]
    for name in ("skip_ratio", "flops_saved", "kl", "decode_skip_ratio"):
        assert dense[name] == 0.0
    for name in ("top1_agreement", "never_skip_fraction", "speedup", "ceiling"):
        assert dense[name] == 1.0
    assert dense["flops_per_token"] == model_cost(MODEL).dense_flops(0, 16) / 16
    assert set(dense["standard_error"]) == {"perplexity"}


def test_quality_is_of_the_whole_text() -> None:
    quality = quality_of(MODEL, profile(), TEXT)
    found = rows(frozenset({"quality"}))
    dense, sparse = found["dense"], found["ffnskip"]
    assert dense["perplexity"] == quality.perplexity_dense.mean
    for name in ("skip_ratio", "perplexity", "kl", "top1_agreement"):
        estimate = getattr(quality, name)
        assert (sparse[name], sparse["standard_error"][name]) == (estimate.mean, estimate.standard_error)
    assert sparse["skip_ratio"] > 0
    saved_per_token = dense["flops_per_token"] - sparse["flops_per_token"]
    saved = model_cost(MODEL).saved_flops(quality.stats, overhead(profile(), MODEL))
    assert saved_per_token == pytest.approx(saved / TEXT.numel())
    assert sparse["flops_saved"] == pytest.approx(saved_per_token / dense["flops_per_token"])


def test_opponents_save_as_many_flops_as_the_profile_net() -> None:
    found = rows(frozenset({"quality", "opponents"}))
    own = found["ffnskip"]["flops_saved_past_warm_up"]
    for name in OPPONENTS:
        # At random it holds on average only; of 14 positions one more or less shows.
        assert found[name]["flops_saved_past_warm_up"] == pytest.approx(own, abs=0.04)
        assert found[name]["kl"] > 0


def test_an_opponent_that_cannot_save_so_much_says_so_in_its_row() -> None:
    plan = Plan(frozenset({"quality", "opponents"}), PROMPT, NEW, 1, PROMPTS, ("cats", "random"))
    everything = pico_profile(MODEL, threshold=-1.0, warm_up=2, cold_s=0, cold_e=6)
    *_, cats, random = run_suite(MODEL, Decoder(MODEL, everything), TEXT, plan, silently)
    assert (cats["name"], cats["kl"], random["missing"]) == ("cats", None, None)
    assert cats["missing"].startswith("it saves at most 0.")


def test_a_layer_adds_what_the_profile_costs_less_when_its_ffn_runs() -> None:
    row = rows(frozenset({"quality", "layers"}))["ffnskip"]
    skipped = quality_of(MODEL, profile(), TEXT).stats.skipped
    added = row["kl_by_layer"]
    assert [value for value, count in zip(added, skipped, strict=True) if not count] == [0.0] * skipped.count(0)
    alone = profile().with_skip(cold_s=1, cold_e=4)  # the last layer of the region decides nothing for others
    expected = row["kl"] - quality_of(MODEL, alone, TEXT).kl.mean
    assert added[4] == pytest.approx(expected)


def test_the_worst_case_is_over_as_many_prompts_as_were_asked_for() -> None:
    found = rows(frozenset({"worst-case"}))
    prompts = TEXT[:PROMPTS, :PROMPT]
    skipping = continue_prompts(Decoder(MODEL, profile()), prompts, NEW, silently)
    assert found["ffnskip"]["never_skip_fraction"] == skipping.stats.never_skip_fraction
    assert found["ffnskip"]["repetition"] == skipping.repetition
    assert found["dense"]["repetition"] == continue_prompts(Decoder(MODEL), prompts, NEW, silently).repetition


def skipped_along(text: Tensor | None) -> SkipStats:
    """In the timed decodes: along the text, whose two rows take turns three times, or in free continuations."""
    decoder = Decoder(MODEL, profile())
    for repetition in range(REPETITIONS):
        if text is None:
            decode = decoder.decode(TEXT[repetition : repetition + 1, :PROMPT], max_new_tokens=NEW)
        else:
            row = text[repetition % 2][None]
            decode = decoder.decode(row[:, :PROMPT], max_new_tokens=NEW, forced=row[:, PROMPT:])
        assert len(list(decode)) == NEW
    return decoder.stats


@pytest.mark.parametrize("timed_on", ["text", "generated"])
def test_speed_has_one_sample_per_repetition_and_the_ceiling_of_the_very_runs(timed_on: str) -> None:
    found = rows(frozenset({"speed"}), timed_on)
    for row in found.values():
        rate = row["tokens_per_second"]
        assert len(rate["samples"]) == REPETITIONS
        assert (rate["min"], rate["median"], rate["max"]) == tuple(sorted(rate["samples"]))
        assert row["speedup"] > 0
    stats = skipped_along(TIMED if timed_on == "text" else None)
    keys = PROMPT + 2 + (NEW - 2) / 2  # past the warm-up of 2
    assert found["ffnskip"]["decode_skip_ratio"] == stats.skip_ratio > 0
    assert found["ffnskip"]["ceiling"] == model_cost(MODEL).ceiling(stats, overhead(profile(), MODEL), keys) > 1
    assert found["hf-dense"]["ceiling"] == 1.0
