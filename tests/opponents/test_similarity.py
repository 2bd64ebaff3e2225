"""FFN-SkipLLM as printed and as its authors' code has it: their settings, and what they save."""

import pytest
from support.model_types import tiny_model
from support.opponents import field, opponent
from support.pico import float64_model, pico_profile, pico_tokens

from ffnskip_cli.measure.flops import model_cost, overhead
from ffnskip_cli.measure.quality import measure_quality
from ffnskip_cli.opponents import set_up
from ffnskip_cli.opponents.similarity import as_printed
from ffnskip_cli.progress import silently

# Steep ends and a plateau, whose FFNs differ enough from token to token for a threshold to tell them apart.
MODEL = float64_model("llama", 3.0, 0.5, 0.5, 0.5, 0.5, 3.0)
LENGTH = 64
TEXT = pico_tokens(LENGTH, batch=4)


@pytest.mark.parametrize("name", ["ffn-skipllm", "unpublished"])
def test_each_saves_what_it_was_asked_for_net_of_its_checks(name: str) -> None:
    found = opponent(name, MODEL, TEXT, 0.05, warm_up=2)
    (quality,) = measure_quality(MODEL, [found.profile], TEXT, silently)
    added = overhead(found.profile, MODEL)
    assert added.check_flops > 0
    saved = model_cost(MODEL).saved_share_past(quality.stats, added, len(TEXT), LENGTH)
    assert saved == pytest.approx(0.05, abs=0.001)


def test_as_printed_a_trigger_skips_the_whole_plateau() -> None:
    skip = opponent("ffn-skipllm", MODEL, TEXT, 0.05, warm_up=2).profile.skip
    plateau = as_printed(field(MODEL, TEXT, 0.05, warm_up=2)).skip
    assert (skip.rule, skip.window, skip.refresh_every, skip.warm_up) == ("cosine", None, None, 2)
    assert (skip.cold_s, skip.cold_e) == (plateau.cold_s, plateau.cold_e) == (2, 4)


def test_where_the_plateau_saves_too_little_it_is_widened() -> None:
    skip = opponent("ffn-skipllm", MODEL, TEXT, 0.12, warm_up=2).profile.skip
    assert (skip.cold_s, skip.cold_e) == (1, 5)


def test_the_authors_code_has_a_window_a_dense_sixth_token_and_a_warm_up_of_its_own() -> None:
    skip = opponent("unpublished", MODEL, TEXT, 0.05, warm_up=10).profile.skip
    assert (skip.window, skip.refresh_every, skip.warm_up) == (1, 6, LENGTH // 64)
    assert (skip.cold_s, skip.cold_e) == (2, 4)  # 5 + 5 of six layers would leave nothing


def test_where_there_is_no_plateau_two_layers_at_either_end_are_cold() -> None:
    spiky = float64_model("llama", 0.01, 3.0, 0.01, 0.01, 3.0, 0.01)
    skip = as_printed(field(spiky, TEXT, 0.05, warm_up=2)).skip
    assert (skip.cold_s, skip.cold_e) == (2, 4)


@pytest.mark.parametrize("name", ["static", "ffn-skipllm", "unpublished"])
def test_models_that_do_more_with_an_ffn_than_to_add_it_have_no_such_row(name: str) -> None:
    model = tiny_model("openai-gpt")
    text = pico_tokens(20, batch=2)
    profile = pico_profile(model, rule="predicted-damage", threshold=1.0, cold_s=1, cold_e=3)
    found, missing = set_up([name], field(model, text, 0.05, profile=profile))
    assert not found
    assert missing[name] == "models of type 'openai-gpt' do more with an FFN's output than to add it"
