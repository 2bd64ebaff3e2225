"""Decoding along a text: its tokens are fed and yielded whatever the model chooses, and decided on by the rule."""

from functools import cache

import pytest
import torch
from support.compiler import needs_compiler
from support.naive import naive_forward
from support.pico import float64_model, middle_threshold, pico_model, pico_profile, pico_tokens
from torch import Tensor

from ffnskip import Decoder, FfnskipError, Profile, SkipStats
from ffnskip.decode import GeneralPath, generate_tokens
from ffnskip.decoder import PathName

PROMPT, NEW, BATCH, WARM_UP = 6, 12, 3, 3
TEXT = pico_tokens(PROMPT + NEW, BATCH)
PROMPTS, FORCED = TEXT[:, :PROMPT], TEXT[:, PROMPT:]
PATHS: tuple[PathName, ...] = ("fused", "general")
FED = NEW - 1  # the last token is never fed back


@cache
def profile() -> Profile:
    beside_a_median = round(middle_threshold(float64_model(), TEXT), 3)
    return pico_profile(float64_model(), threshold=beside_a_median, warm_up=WARM_UP)


def along(decoder: Decoder) -> SkipStats:
    """What was skipped along the text, which is what the decoder must yield."""
    steps = decoder.decode(PROMPTS, max_new_tokens=NEW, forced=FORCED)
    assert torch.equal(torch.stack(list(steps), dim=1), FORCED)
    return decoder.stats


def test_a_forced_decode_skips_what_the_rule_says_of_that_text() -> None:
    stats = along(Decoder(float64_model(), profile(), path="general"))
    rows = [naive_forward(float64_model(), row[:-1], profile().skip, PROMPT).skipped for row in TEXT]
    skipped = sum(row.sum(dim=0) for row in rows)
    assert stats.skipped == torch.as_tensor(skipped).tolist()
    assert (stats.warm_up_tokens, stats.tokens) == (BATCH * WARM_UP, BATCH * (FED - WARM_UP))
    assert 0 < stats.skip_ratio < 1


@needs_compiler
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_both_paths_decide_alike_along_a_text(name: str) -> None:
    model = pico_model(name)
    skipping = pico_profile(model, threshold=middle_threshold(model, TEXT) + 1e-4)  # beside a value, not on it
    fused, general = (along(Decoder(model, skipping, path=path)) for path in PATHS)
    assert (fused.tokens, fused.skipped, fused.checked) == (general.tokens, general.skipped, general.checked)
    assert 0 < fused.skip_ratio < 1


def test_the_logits_are_those_of_the_text() -> None:
    chosen = []

    class Noting(GeneralPath):
        def _forward(self, tokens: Tensor) -> Tensor:
            logits = super()._forward(tokens)
            chosen.append(logits.argmax(-1))
            return logits

    model = float64_model()
    list(generate_tokens(Noting(model), PROMPTS, max_new_tokens=NEW, forced=FORCED))
    with torch.inference_mode():
        expected = model(TEXT[:, :-1]).logits[:, PROMPT - 1 :].argmax(-1)
    assert torch.equal(torch.stack(chosen, dim=1), expected)
    assert not torch.equal(expected, FORCED)


def test_forcing_what_the_model_would_choose_changes_nothing() -> None:
    decoder = Decoder(float64_model(), profile(), path="general")
    free = torch.stack(list(decoder.decode(PROMPTS, max_new_tokens=NEW)), dim=1)
    stats = decoder.stats
    decoder.reset_stats()
    list(decoder.decode(PROMPTS, max_new_tokens=NEW, forced=free))
    assert decoder.stats == stats


def test_a_row_ends_with_a_forced_stop_token() -> None:
    stop = int(FORCED[0, 2])
    steps = Decoder(float64_model()).decode(PROMPTS[:1], max_new_tokens=NEW, forced=FORCED[:1], stop_tokens={stop})
    assert [int(step[0]) for step in steps] == FORCED[0, :3].tolist()


@pytest.mark.parametrize("shape", [(BATCH, NEW - 1), (BATCH - 1, NEW)])
def test_forced_tokens_that_do_not_fit_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(FfnskipError, match=r"^Forced tokens of shape \[.*\] do not fit 3 prompts and 12 new tokens\.$"):
        Decoder(float64_model()).decode(PROMPTS, max_new_tokens=NEW, forced=torch.ones(shape, dtype=torch.long))
