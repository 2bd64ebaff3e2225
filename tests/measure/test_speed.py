"""How speed is measured: who runs when, what counts, and that all ways do the same work. No test looks at a clock."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support.pico import N_LAYERS, pico_model, pico_profile, pico_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffnskip import Decoder, SkipStats
from ffnskip.decode import GeneralPath, generate_tokens
from ffnskip_cli.measure.speed import Run, Speed, Way, decoder_way, hugging_face_way, measure_speed
from ffnskip_cli.progress import silently

PROMPT, NEW = pico_tokens(6), 12


@contextmanager
def fed(model: PreTrainedModel) -> Iterator[list[list[int]]]:
    """The tokens of each forward pass."""
    passes: list[list[int]] = []

    def look(module: nn.Module, args: tuple[Tensor]) -> None:
        passes.append(args[0].flatten().tolist())

    hook = model.get_input_embeddings().register_forward_pre_hook(look)
    try:
        yield passes
    finally:
        hook.remove()


def noting(calls: list[tuple[str, int, int]], name: str, forced: list[list[int] | None] | None = None) -> Way:
    """A way that notes its name, its prompt's first token, how many tokens it was asked for, and the forced ones."""

    def way(prompt: Tensor, new_tokens: int, text: Tensor | None) -> Run:
        assert prompt.shape == (1, 2)
        calls.append((name, int(prompt[0, 0]), new_tokens))
        if forced is not None:
            forced.append(None if text is None else text.flatten().tolist())
        return Run([0.0, 0.5, float(len(calls))], 0.1, 1.0)

    return way


def test_ways_take_turns_on_the_same_prompt_after_a_rehearsal_that_is_not_counted() -> None:
    calls: list[tuple[str, int, int]] = []
    ways = {name: noting(calls, name) for name in "abc"}
    speeds = measure_speed(ways, torch.tensor([[7, 0], [8, 0]]), 20, 4, 5, silently)
    rehearsal, turns = calls[:3], calls[3:]
    assert [(name, prompt) for name, prompt, _ in rehearsal] == [("a", 7), ("b", 7), ("c", 7)]
    assert all(5 < new_tokens < 20 for _, _, new_tokens in rehearsal)  # past the warm-up of 5
    assert "".join(name for name, _, _ in turns) == "abc" + "bca" + "cab" + "abc"
    assert [prompt for _, prompt, _ in turns] == [7] * 3 + [8] * 3 + [7] * 3 + [8] * 3
    assert {new_tokens for _, _, new_tokens in turns} == {20}
    # the n-th call says that two tokens took n seconds
    assert speeds["a"].samples == [2 / 4, 2 / 9, 2 / 11, 2 / 13]
    assert [len(speed.samples) for speed in speeds.values()] == [4, 4, 4]


def test_each_prompt_is_timed_along_its_own_text_after_a_free_rehearsal() -> None:
    calls: list[tuple[str, int, int]] = []
    forced: list[list[int] | None] = []
    ways = {name: noting(calls, name, forced) for name in "ab"}
    text = torch.tensor([[3, 4, 5], [6, 7, 8]])
    measure_speed(ways, torch.tensor([[7, 0], [8, 0]]), 3, 3, 1, silently, text)
    assert [prompt for _, prompt, _ in calls[2:]] == [7, 7, 8, 8, 7, 7]
    assert forced == [None, None, [3, 4, 5], [3, 4, 5], [6, 7, 8], [6, 7, 8], [3, 4, 5], [3, 4, 5]]


def test_runs_are_summed_up_by_their_medians_and_counts() -> None:
    assert Run([10.0, 10.5, 11.0, 12.0], 0.1, 2.1).tokens_per_second == 1.5  # of the tokens behind the first
    one, other = Speed(), Speed()
    assert one.total_stats is None
    for seconds, stats in ((1.0, SkipStats(2, 5, skipped=[0, 4])), (4.0, SkipStats(2, 7)), (2.0, SkipStats(2, 1))):
        one.add(Run([0.0, seconds], seconds, 2 * seconds, stats))
        other.add(Run([0.0, 4.0], 0.1, 4.1))
    assert (one.samples, one.median) == ([1.0, 0.25, 0.5], 0.5)
    assert one.total_stats == SkipStats(2, 13, skipped=[0, 4])
    assert other.total_stats is None
    assert one.speedup_over(other) == 2.0


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_dense_and_hugging_face_generate_the_same_tokens(name: str) -> None:
    """Past the end-of-text token too: a run that stops early would be timed over fewer tokens."""
    model = pico_model(name)
    tokens = [int(token) for token in generate_tokens(GeneralPath(model), PROMPT, max_new_tokens=NEW)]
    model.generation_config.eos_token_id = tokens[3]
    expected = [PROMPT[0].tolist(), *([token] for token in tokens[:-1])]  # the last one is never fed back
    for way in (decoder_way(Decoder(model, path="general")), hugging_face_way(model)):
        with fed(model) as passes:
            run = way(PROMPT, NEW, None)
        assert passes == expected
        assert len(run.times) == NEW
        assert run.times == sorted(run.times)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_dense_and_hugging_face_decode_along_the_same_text(name: str) -> None:
    model = pico_model(name)
    text = pico_tokens(NEW, seed=1)
    model.generation_config.eos_token_id = int(text[0, 3])
    for way in (decoder_way(Decoder(model, path="general"), 3), hugging_face_way(model, 3)):
        with fed(model) as passes:
            run = way(PROMPT, NEW, text)
        assert passes == [PROMPT[0].tolist(), *([token] for token in text[0, :-1].tolist())]
        assert len(run.times) == NEW - 3  # warm-up is not timed


def test_the_profiles_way_skips_counts_and_takes_the_profile_off() -> None:
    model = pico_model()
    modules = list(model.modules())
    run = decoder_way(Decoder(model, pico_profile(model, threshold=-1.0)), warm_up=2)(PROMPT, NEW, None)
    assert len(run.times) == NEW - 2
    fed_past_warm_up = NEW - 1 - 2
    assert (run.stats.tokens, run.stats.warm_up_tokens) == (fed_past_warm_up, 2)
    assert run.stats.skipped == [0, 0, *[fed_past_warm_up] * 3, 0]
    assert run.stats.n_layers == N_LAYERS
    assert list(model.modules()) == modules
    assert decoder_way(Decoder(model))(PROMPT, NEW, None).stats is None
