"""The rule against Algorithm 1 written out naively (`naive.py`): on recorded similarities and in a running model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.factories import make_profile
from support.naive import NaiveToken, naive_forward
from support.pico import N_LAYERS, decisions, feed, float64_model, pico_profile, pico_tokens

import ffnskip
from ffnskip.general.walk import Mode
from ffnskip.profiles.schema import Skip
from ffnskip.rules import may_skip
from ffnskip.rules.cosine import similarity


@st.composite
def skips(draw: st.DrawFn, threshold: st.SearchStrategy[float]) -> Skip:
    cold_s = draw(st.integers(0, N_LAYERS - 1))
    return make_profile(
        cold_s=cold_s,
        cold_e=draw(st.integers(cold_s + 1, N_LAYERS)),
        threshold=draw(threshold),
        warm_up=draw(st.integers(0, 4)),
        window=draw(st.none() | st.integers(1, N_LAYERS + 1)),
        refresh_every=draw(st.none() | st.integers(2, 4)),
    ).skip


COARSE = st.sampled_from([-1.0, 0.5, 0.75, 1.0])  # so that similarities often meet the threshold exactly
TEXT = pico_tokens(14)


@given(
    skip=skips(COARSE),
    similarities=st.lists(st.lists(COARSE, min_size=N_LAYERS, max_size=N_LAYERS), min_size=1, max_size=12),
)
def test_simulate_decides_as_algorithm_1(skip: Skip, similarities: list[list[float]]) -> None:
    expected = []
    for index, values in enumerate(similarities):
        token = NaiveToken(skip, index)
        for layer, value in enumerate(values):
            if not token.skips(layer):
                token.ran(layer, value)
        expected.append(token.skipped)
    allowed = may_skip(torch.arange(len(similarities)), skip)
    assert skip.by.simulate(torch.tensor(similarities), allowed, skip).tolist() == expected


@settings(max_examples=40, deadline=None, derandomize=True)
@given(skip=skips(st.floats(0.8, 1.0)))
def test_a_model_in_score_mode_decides_as_algorithm_1(skip: Skip) -> None:
    naive = naive_forward(float64_model(), TEXT[0], skip)
    with applied(skip, "score"), decisions(float64_model()) as passes, torch.inference_mode():
        logits = float64_model()(TEXT).logits
    assert torch.equal(passes[0][0], naive.skipped)
    assert torch.allclose(logits[0], naive.logits, atol=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(skip=skips(st.floats(0.8, 1.0)), prompt=st.integers(1, 5))
def test_a_model_in_decode_mode_decides_as_algorithm_1(skip: Skip, prompt: int) -> None:
    naive = naive_forward(float64_model(), TEXT[0], skip, prompt)
    with applied(skip, "decode"), decisions(float64_model()) as passes:
        logits = feed(float64_model(), TEXT, prompt)
    assert torch.equal(torch.cat(passes, dim=1)[0], naive.skipped)
    assert torch.allclose(logits[0], naive.logits, atol=1e-5)


def applied(skip: Skip, mode: Mode) -> ffnskip.Applied:
    profile = pico_profile(float64_model()).model_copy(update={"skip": skip})
    return ffnskip.apply(float64_model(), profile, mode=mode, check=False)


def test_similarity_is_the_cosine_of_h_and_h_plus_f() -> None:
    h, f = torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([[1.0, -1.0], [-6.0, -8.0]])
    assert similarity(h, f).tolist() == pytest.approx([24 / 25, -1.0])
    assert float(torch.cosine_similarity(h[0], f[0], dim=0)) == pytest.approx(-0.1414, abs=1e-4)  # cos(norm(h), f)


def test_similarity_of_half_precision_is_finer_than_half_precision() -> None:
    h, f = torch.tensor([16.0, 0.0], dtype=torch.bfloat16), torch.tensor([0.0, 1.0], dtype=torch.bfloat16)
    assert similarity(h, f).dtype == torch.float32
    assert float(similarity(h, f)) == pytest.approx(16 / 257**0.5, abs=1e-6)


def test_tokens_in_warm_up_and_every_nth_after_it_may_not_skip() -> None:
    skip = make_profile(warm_up=2, refresh_every=3).skip
    assert may_skip(torch.arange(9), skip).tolist() == [False, False, True, True, False, True, True, False, True]
