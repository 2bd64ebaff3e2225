"""Repetition by hand, and the tokens that never skip counted one by one."""

from functools import cache

import pytest
import torch
from support.naive import naive_forward
from support.pico import float64_model, middle_threshold, pico_profile, pico_tokens
from torch import Tensor

import ffnskip
from ffnskip import Decoder, Profile
from ffnskip.decode import GeneralPath, generate_tokens
from ffnskip_cli.measure import worst_case as module
from ffnskip_cli.measure.quality import repetition
from ffnskip_cli.measure.worst_case import Continuation, continue_prompts
from ffnskip_cli.progress import silently

MODEL = float64_model()
PROMPTS, NEW = pico_tokens(6, batch=5), 12


@cache
def profile() -> Profile:
    beside_a_median = round(middle_threshold(MODEL, PROMPTS), 3)
    return pico_profile(MODEL, threshold=beside_a_median, warm_up=3, refresh_every=3)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([1, 1, 1, 1, 1, 1], 2 / 3),  # one of three 4-grams is new
        ([1, 2, 1, 2, 1, 2, 1, 2], 3 / 5),  # 1212 2121 1212 2121 1212
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1 / 6),
        ([1, 2, 3, 9, 1, 2, 3], 0.0),  # a repeated 3-gram does not count
        ([1, 1, 1, 1], 0.0),
        ([1, 1, 1], 0.0),
        ([], 0.0),
    ],
)
def test_repetition_is_the_share_of_4_grams_that_occurred_before(tokens: list[int], expected: float) -> None:
    assert repetition(torch.tensor([tokens])) == pytest.approx(expected)


def test_repetition_of_several_continuations_is_their_mean_and_none_of_across() -> None:
    rows = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 1]])
    assert Continuation(rows, None).repetition == pytest.approx(2 / 9)


def alone(prompt: Tensor) -> Tensor:
    return torch.cat(list(generate_tokens(GeneralPath(MODEL), prompt[None], max_new_tokens=NEW)))


def test_prompts_are_continued_as_if_each_were_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 2)
    dense = continue_prompts(Decoder(MODEL), PROMPTS, NEW, silently)
    assert torch.equal(dense.tokens, torch.stack([alone(prompt) for prompt in PROMPTS]))
    assert dense.stats is None
    skipping = continue_prompts(Decoder(MODEL, profile()), PROMPTS, NEW, silently)
    with ffnskip.apply(MODEL, profile()):
        assert torch.equal(skipping.tokens, torch.stack([alone(prompt) for prompt in PROMPTS]))
    assert not torch.equal(skipping.tokens, dense.tokens)


@pytest.mark.parametrize("rows", [2, 16])
def test_the_share_of_tokens_that_never_skip_is_the_naive_count(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", rows)
    text = continue_prompts(Decoder(MODEL, profile()), PROMPTS, NEW, silently)
    past = []
    for prompt, continuation in zip(PROMPTS, text.tokens, strict=True):
        fed = torch.cat([prompt, continuation[:-1]])  # nobody reads what follows the last token
        tokens = naive_forward(MODEL, fed, profile().skip, len(prompt)).tokens
        past += [token for token in tokens if token.past_warm_up]
    never = sum(not any(token.skipped) for token in past)
    assert (text.stats.tokens, text.stats.never_skipped) == (len(past), never)
    assert text.stats.never_skip_fraction == never / len(past)
    assert 1 / 3 < never / len(past) < 1  # every third runs dense, and some others do
