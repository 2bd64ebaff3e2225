"""What is generated is known of each sequence: it skips as in plain decoding, whoever drives the model and how."""

from collections.abc import Iterator
from threading import Thread

import pytest
import torch
from support.model_types import tiny_model
from support.pico import (
    decisions,
    float64_model,
    middle_threshold,
    pico_model,
    pico_profile,
    pico_tokens,
)
from torch import Tensor
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, PreTrainedModel

import ffnskip
from ffnskip.profiles.profile import Profile

PROMPT, NEW, WARM_UP = 7, 12, 3
TEXT = pico_tokens(PROMPT, batch=3)
TEXT_1 = TEXT[:1]


@pytest.fixture
def model() -> PreTrainedModel:
    return float64_model()


@pytest.fixture
def profile(model: PreTrainedModel) -> Profile:
    """Some tokens skip, and each skip changes what is written."""
    return pico_profile(model, threshold=middle_threshold(model, TEXT), warm_up=WARM_UP)


def generate(model: PreTrainedModel, prompt: Tensor = TEXT_1, **options: object) -> list[list[int]]:
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    written: Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    return written[:, prompt.shape[1] :].tolist()


def plainly(model: PreTrainedModel, profile: Profile, prompt: Tensor = TEXT_1) -> list[list[int]]:
    with ffnskip.apply(model, profile) as applied:
        written = generate(model, prompt)
    assert 0 < applied.stats.skip_ratio < 0.6
    if prompt is TEXT_1:
        assert written != generate(model, prompt)
    return written


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_a_prompt_in_chunks(model: PreTrainedModel, profile: Profile, chunk: int) -> None:
    """Three leave one token for the last chunk, which is prompt all the same."""
    expected = plainly(model, profile)
    with ffnskip.apply(model, profile) as applied:
        assert generate(model, prefill_chunk_size=chunk) == expected
    assert (applied.stats.warm_up_tokens, applied.stats.tokens) == (WARM_UP, NEW - 1 - WARM_UP)


def test_prompt_lookup(model: PreTrainedModel, profile: Profile) -> None:
    repeated = TEXT[:1, :3].repeat(1, 4)
    expected = plainly(model, profile, repeated)
    with ffnskip.apply(model, profile) as applied, decisions(model) as passes:
        assert generate(model, repeated, prompt_lookup_num_tokens=3) == expected
    assert any(tokens.shape[1] > 1 and bool(tokens.any()) for tokens in passes)
    assert applied.stats.skip_ratio > 0


def test_assisted_decoding(model: PreTrainedModel, profile: Profile) -> None:
    expected = plainly(model, profile)
    with ffnskip.apply(model, profile), decisions(model) as passes:
        assert generate(model, assistant_model=pico_model("llama", torch.float64)) == expected
    assert any(tokens.shape[1] > 1 and bool(tokens.any()) for tokens in passes)


def test_without_a_cache(model: PreTrainedModel, profile: Profile) -> None:
    expected = plainly(model, profile, TEXT)
    with ffnskip.apply(model, profile):
        assert generate(model, TEXT, use_cache=False) == expected


def steps(model: PreTrainedModel, prompt: Tensor, *, cached: bool = True) -> Iterator[int]:
    """Greedily, one token at a time, in a loop of one's own."""
    cache, text = (DynamicCache(config=model.config) if cached else None), prompt
    for _ in range(NEW):
        with torch.inference_mode():
            new = text[:, cache.get_seq_length() :] if cache is not None else text
            following = model(new, past_key_values=cache, use_cache=cached).logits[:, -1].argmax(dim=-1)
        text = torch.cat([text, following[:, None]], dim=1)
        yield int(following)


@pytest.mark.parametrize("cached", [True, False])
def test_a_loop_of_ones_own(model: PreTrainedModel, profile: Profile, cached: bool) -> None:
    expected = plainly(model, profile)
    with ffnskip.apply(model, profile):
        assert [list(steps(model, TEXT_1, cached=cached))] == expected


def test_a_cache_that_the_model_makes(model: PreTrainedModel, profile: Profile) -> None:
    expected = plainly(model, profile)
    with ffnskip.apply(model, profile), torch.inference_mode():
        output, written = model(TEXT[:1]), []
        for _ in range(NEW):
            written.append(int(output.logits[0, -1].argmax()))
            output = model(torch.tensor([written[-1:]]), past_key_values=output.past_key_values)
    assert [written] == expected


def test_two_conversations_in_turns(model: PreTrainedModel, profile: Profile) -> None:
    first, second = (plainly(model, profile, TEXT[row : row + 1]) for row in (0, 1))
    with ffnskip.apply(model, profile):
        pairs = list(zip(steps(model, TEXT_1), steps(model, TEXT[1:2]), strict=True))
    assert [[one for one, _ in pairs]] == first
    assert [[two for _, two in pairs]] == second


@pytest.mark.parametrize("cached", [True, False])
def test_classifier_free_guidance_runs_two_sequences(model: PreTrainedModel, cached: bool) -> None:
    """With the prompt, and with its last token alone: each has its own prompt and its own warm-up."""
    always = pico_profile(model, threshold=-1.0, warm_up=WARM_UP)
    with ffnskip.apply(model, always), decisions(model) as passes:
        generate(model, guidance_scale=1.5, use_cache=cached)
    skipping = [int(tokens[..., 2].sum()) for tokens in passes]
    for sequence in (skipping[::2], skipping[1::2]):
        assert [min(1, count) for count in sequence] == [0] * (1 + WARM_UP) + [1] * (NEW - 1 - WARM_UP)


def test_continuous_batching_of_several_requests(profile: Profile) -> None:
    model = pico_model()
    prompts = [TEXT[0].tolist(), TEXT[1, :4].tolist(), TEXT[2, :6].tolist()]
    expected = [plainly(model, profile, torch.tensor([prompt]))[0] for prompt in prompts]
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with ffnskip.apply(model, profile) as applied:
        results = model.generate_batch(
            prompts,
            generation_config=settings,
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64),  # or all memory
            progress_bar=False,
        )
    written = {tuple(result.prompt_ids): result.generated_tokens for result in results.values()}
    assert [written[tuple(prompt)] for prompt in prompts] == expected
    assert applied.stats.warm_up_tokens == 3 * WARM_UP


def test_positions_in_three_dimensions() -> None:
    model = tiny_model("qwen2_5_vl (vision)")
    info = ffnskip.profiles.identity.model_info(model, id="org/tiny").model_dump()
    profile = pico_profile(model, **info, cold_s=1, cold_e=4, threshold=-1.0, warm_up=WARM_UP)
    with ffnskip.apply(model, profile) as applied:
        generate(model)
    assert (applied.stats.warm_up_tokens, applied.stats.tokens) == (WARM_UP, NEW - 1 - WARM_UP)
    assert applied.stats.skip_ratio == 0.5


def test_threads_share_a_model(model: PreTrainedModel, profile: Profile) -> None:
    expected = [plainly(model, profile, TEXT[row : row + 1]) for row in range(3)]
    written: list[list[list[list[int]]]] = [[], [], []]

    def run(row: int) -> None:
        for _ in range(4):
            written[row].append(generate(model, TEXT[row : row + 1]))

    with ffnskip.apply(model, profile) as applied:
        threads = [Thread(target=run, args=(row,)) for row in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert written == [[tokens] * 4 for tokens in expected]
    assert applied.stats.tokens == 3 * 4 * (NEW - 1 - WARM_UP)


def test_a_conversation_may_go_on_in_another_thread(model: PreTrainedModel, profile: Profile) -> None:
    expected, written = plainly(model, profile), list[int]()
    with ffnskip.apply(model, profile):
        turns = steps(model, TEXT_1)
        for _ in range(NEW):
            thread = Thread(target=lambda: written.append(next(turns)))
            thread.start()
            thread.join()
    assert [written] == expected


def test_generate_is_the_models_own_again_afterwards(model: PreTrainedModel, profile: Profile) -> None:
    with ffnskip.apply(model, profile):
        assert "generate" in vars(model)
    assert "generate" not in vars(model)
