"""Decode mode: the prompt and the warm-up run dense, then tokens skip, whoever drives the model."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from support.naive import naive_forward
from support.pico import (
    HIDDEN,
    N_LAYERS,
    decisions,
    feed,
    ffn_runs,
    float64_model,
    middle_threshold,
    pico_profile,
    pico_tokens,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import ffnskip
from ffnskip.decode import GeneralPath, generate_tokens
from ffnskip.profiles.profile import Profile

PROMPT, NEW = 7, 10
TEXT = pico_tokens(PROMPT, batch=3)


@cache
def middle_profile(name: str = "llama") -> Profile:
    return pico_profile(float64_model(name), threshold=middle_threshold(float64_model(name), TEXT), warm_up=3)


def with_generate(model: PreTrainedModel, prompt: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
    """``[batch, NEW]`` tokens, greedily."""
    mask = torch.ones_like(prompt) if mask is None else mask
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | options
    result: Tensor = model.generate(prompt, attention_mask=mask, **settings)
    return result[:, prompt.shape[1] :]


def with_decode(model: PreTrainedModel, prompt: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
    settings = {"max_new_tokens": NEW} | options
    return torch.stack(list(generate_tokens(GeneralPath(model), prompt, attention_mask=mask, **settings)), dim=1)


Runner = Callable[..., Tensor]
both_runners = pytest.mark.parametrize("run", [with_generate, with_decode])


@both_runners
def test_prompt_and_warm_up_run_dense_and_then_tokens_skip(run: Runner) -> None:
    model = float64_model()
    with ffnskip.apply(model, pico_profile(model, threshold=-1.0, warm_up=3)), decisions(model) as passes:
        run(model, TEXT)
    assert [len(tokens[0]) for tokens in passes] == [PROMPT] + [1] * (NEW - 1)
    assert not torch.cat(passes[:4], dim=1).any()
    always = torch.tensor([False, False, True, True, True, False])
    assert torch.equal(torch.cat(passes[4:], dim=1), always.expand(3, NEW - 4, N_LAYERS))
    with ffnskip.apply(model, pico_profile(model, threshold=-1.0, warm_up=0)), decisions(model) as passes:
        run(model, TEXT[:, :1])
    assert [int(tokens.sum()) for tokens in passes] == [0] + [9] * (NEW - 1)


def test_an_ffn_that_every_row_skips_is_not_called() -> None:
    model = float64_model()
    profile = pico_profile(model, threshold=-1.0, warm_up=3)
    with ffn_runs(model) as runs, ffnskip.apply(model, profile, check=False):
        with_decode(model, TEXT)
    assert [len(run) for run in runs] == [NEW, NEW, 4, 4, 4, NEW]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox-parallel", "gpt2", "glm4"])
def test_decode_mode_and_score_mode_take_the_same_decisions(name: str) -> None:
    model, profile = float64_model(name), middle_profile(name)
    with ffnskip.apply(model, profile) as applied, decisions(model) as passes:
        text = torch.cat([TEXT, with_decode(model, TEXT)[:, :-1]], dim=1)
        one_by_one, decode_stats = torch.cat(passes, dim=1), applied.stats
    whole_warm_up = profile.skip.model_copy(update={"warm_up": PROMPT + profile.skip.warm_up})
    scoring = profile.model_copy(update={"skip": whole_warm_up})
    with ffnskip.apply(model, scoring, mode="score") as applied, decisions(model) as passes, torch.inference_mode():
        logits = model(text).logits
    assert 0 < applied.stats.skip_ratio < 0.5
    assert torch.equal(passes[0], one_by_one)
    assert applied.stats.skipped == decode_stats.skipped
    with ffnskip.apply(model, profile):
        assert torch.allclose(logits, feed(model, text, PROMPT), atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mistral", "gpt2", "falcon-one-norm"])
def test_greedy_decode_is_generate_token_for_token(name: str) -> None:
    model = float64_model(name)
    assert torch.equal(with_decode(model, TEXT), with_generate(model, TEXT))
    with ffnskip.apply(model, middle_profile(name)) as applied:
        skipping = with_decode(model, TEXT)
        stats = applied.stats
        applied.reset_stats()
        assert torch.equal(with_generate(model, TEXT), skipping)
    assert applied.stats == stats
    assert 0 < stats.skip_ratio < 0.5


@both_runners
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_of_a_padded_batch_decide_as_they_do_alone(run: Runner, name: str) -> None:
    model, lengths = float64_model(name), (PROMPT, 4, 1)
    padding = torch.tensor([[column < PROMPT - length for column in range(PROMPT)] for length in lengths])
    with ffnskip.apply(model, middle_profile(name)), decisions(model) as passes:
        together = run(model, TEXT.masked_fill(padding, 0), (~padding).long())
        rows = torch.cat(passes[1:], dim=1)
        for row, length in enumerate(lengths):
            passes.clear()
            alone = run(model, TEXT[row : row + 1, PROMPT - length :])
            assert torch.equal(alone[0], together[row])
            assert torch.equal(torch.cat(passes[1:], dim=1)[0], rows[row])
    assert not (rows == rows[:1]).all()


def test_padding_is_neither_skipped_nor_counted_in_score_mode() -> None:
    model, mask = float64_model(), torch.ones_like(TEXT)
    mask[1, 4:] = 0
    profile = pico_profile(model, threshold=-1.0, warm_up=2)
    with ffnskip.apply(model, profile, mode="score") as applied, decisions(model) as passes, torch.inference_mode():
        model(TEXT, attention_mask=mask)
    assert passes[0][..., 2].long().sum(dim=1).tolist() == [PROMPT - 2, 4 - 2, PROMPT - 2]
    assert (applied.stats.tokens, applied.stats.warm_up_tokens) == (5 + 2 + 5, 2 + 2 + 2)


def test_stats_and_cache_are_those_of_the_naive_algorithm() -> None:
    """The cache holds every position of every layer, also behind skipped FFNs."""
    model, profile = float64_model(), middle_profile()
    with ffnskip.apply(model, profile):
        text = torch.cat([TEXT[:1], with_decode(model, TEXT[:1])[:, :-1]], dim=1)
    naive, cached = naive_forward(model, text[0], profile.skip, PROMPT), DynamicCache(config=model.config)
    with ffnskip.apply(model, profile) as applied:
        feed(model, text, PROMPT, cached)
    for mine, expected in zip(cached.layers, naive.cache.layers, strict=True):
        assert mine.keys.shape == (1, 2, text.shape[1], HIDDEN // 4)
        assert torch.allclose(mine.keys, expected.keys, atol=1e-5)
        assert torch.allclose(mine.values, expected.values, atol=1e-5)
    stats, past = applied.stats, [token for token in naive.tokens if token.past_warm_up]
    assert (stats.tokens, stats.warm_up_tokens) == (len(past), 3) == (NEW - 1 - 3, 3)
    assert stats.skipped == naive.skipped.sum(dim=0).tolist()
    first = [token.skipped.index(True) for token in past if any(token.skipped)]
    assert stats.first_skipped == [first.count(layer) for layer in range(N_LAYERS)]
    compared = [layer for token in past for layer in token.compared if layer < profile.skip.cold_e - 1]
    assert stats.checked == [compared.count(layer) for layer in range(N_LAYERS)]
    assert stats.skip_ratio == sum(map(sum, (token.skipped for token in past))) / (N_LAYERS * len(past)) > 0
    assert stats.never_skip_fraction == (len(past) - len(first)) / len(past)


def test_a_second_turn_runs_dense_and_warms_up_again_and_a_cache_that_was_filled_before_counts_as_prompt() -> None:
    model, past = float64_model(), DynamicCache(config=float64_model().config)
    turns, filled = TEXT.repeat(1, 3), DynamicCache(config=model.config)
    with ffnskip.apply(model, pico_profile(model, threshold=-1.0, warm_up=1)), decisions(model) as passes:
        feed(model, turns[:, :10], PROMPT, past)
        feed(model, turns[:, 10:], 4, past)
    assert [bool(tokens.any()) for tokens in passes] == [False, False, True, True, False, False] + [True] * 6
    with torch.inference_mode():
        model(TEXT, past_key_values=filled)
    with ffnskip.apply(model, pico_profile(model, threshold=-1.0, warm_up=2)), decisions(model) as passes:
        feed(model, TEXT[:, :4], 1, filled)
    assert [bool(tokens.any()) for tokens in passes] == [False, False, True, True]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_static_cache_changes_nothing(name: str) -> None:
    model = float64_model(name)
    with ffnskip.apply(model, middle_profile(name)) as applied:
        dynamic, stats = with_generate(model, TEXT), applied.stats
        applied.reset_stats()
        assert torch.equal(with_generate(model, TEXT, cache_implementation="static"), dynamic)
    assert applied.stats == stats
    assert stats.skip_ratio > 0


def test_beams_are_rows_that_decide_alone() -> None:
    model = float64_model()
    with ffnskip.apply(model, pico_profile(model, threshold=-1.0, warm_up=3)), decisions(model) as passes:
        with_generate(model, TEXT, num_beams=2)
    assert [int(tokens[..., 2].sum()) for tokens in passes] == [0] * 4 + [6] * (NEW - 4)


def test_a_pass_that_fails_half_way_leaves_the_next_prompt_dense() -> None:
    model, past = float64_model(), DynamicCache(config=float64_model().config)

    def fail(*_: object) -> None:
        raise MemoryError

    with ffnskip.apply(model, pico_profile(model, threshold=-1.0, warm_up=0)), decisions(model) as passes:
        feed(model, TEXT, PROMPT - 1, past)
        hook = model.model.norm.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            feed(model, TEXT[:, :1], 1, past)
        hook.remove()
        feed(model, TEXT, PROMPT - 1)
    assert [bool(tokens.any()) for tokens in passes] == [False, True, True, False, True]


def test_a_row_ends_with_its_stop_token_and_the_loop_with_the_last_row() -> None:
    model = float64_model()
    free = with_decode(model, TEXT)
    stops = [int(free[0, 2]), int(free[1, 5]), int(free[2, 4])]
    expected, ends = free.clone(), []
    for row in range(3):
        end = next(step for step in range(NEW) if int(free[row, step]) in stops)
        expected[row, end:] = free[row, end]
        ends.append(end)
    assert torch.equal(with_decode(model, TEXT, stop_tokens=stops), expected[:, : max(ends) + 1])
    assert max(ends) < NEW - 1
    with decisions(model) as passes:
        assert not list(generate_tokens(GeneralPath(model), TEXT, max_new_tokens=0))
    assert not passes


def test_rows_past_their_stop_token_are_not_counted() -> None:
    model = float64_model()
    free = with_decode(model, TEXT)
    stop = int(free[0, 0])
    lengths = [next((step for step in range(NEW) if int(row[step]) == stop), NEW - 1) for row in free]
    with ffnskip.apply(model, pico_profile(model, threshold=2.0, warm_up=3)) as applied:
        with_decode(model, TEXT, stop_tokens=[stop])
    assert min(lengths) == 0 < max(lengths)
    assert applied.stats.tokens + applied.stats.warm_up_tokens == sum(lengths)
    assert applied.stats.tokens == sum(max(length - 3, 0) for length in lengths)


def test_a_sequence_whose_prompt_was_never_seen_starts_with_its_warm_up() -> None:
    model = float64_model()
    with ffnskip.apply(model, pico_profile(model, threshold=-1.0, warm_up=2)) as applied:
        with_decode(model, TEXT[:1])
        past = DynamicCache(config=model.config)
        applied.mode = "score"
        with torch.inference_mode():
            model(TEXT[:1], past_key_values=past)  # not as a prompt: the rule of decode mode learns nothing of it
            applied.mode = "decode"
            applied.reset_stats()
            for token in TEXT[1, :4]:
                model(token[None, None], past_key_values=past)
    assert (applied.stats.warm_up_tokens, applied.stats.tokens) == (2, 2)
