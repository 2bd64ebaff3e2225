"""FFN-SkipLLM as printed and as its authors' code has it: their settings, and what they save."""

import pytest
from support.opponents import field, opponent
from support.pico import float64_model, pico_tokens

from ffnskip_cli.measure.flops import model_cost, overhead
from ffnskip_cli.measure.quality import measure_quality
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
    assert saved == pytest.approx(0.05, abs=0.01)


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
