"""How the next token is chosen: reproducibly, and from the distribution that was asked for."""

import pytest
import torch
from support.pico import VOCABULARY, float64_model, pico_tokens
from torch import Tensor
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from ffnskip import FfnskipError, Sampling
from ffnskip.decode import GeneralPath, generate_tokens

TEXT = pico_tokens(7, batch=3)


def sampled(**options: float) -> Tensor:
    """``[3, 10]`` tokens of the dense model; greedy ones without options."""
    steps = generate_tokens(GeneralPath(float64_model()), TEXT, max_new_tokens=10, sampling=Sampling(**options))
    return torch.stack(list(steps), dim=1)


def test_sampling_depends_on_its_seed_and_on_nothing_else() -> None:
    state = torch.get_rng_state()
    once = sampled(temperature=1.0, seed=1)
    torch.manual_seed(5)
    assert torch.equal(sampled(temperature=1.0, seed=1), once)
    assert not torch.equal(sampled(temperature=1.0, seed=2), once)
    torch.set_rng_state(state)
    sampled(temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cold_or_narrow_sample_is_the_greedy_one() -> None:
    greedy = sampled()
    assert torch.equal(sampled(temperature=1e-4), greedy)
    assert torch.equal(sampled(temperature=1.0, top_p=1e-9), greedy)
    assert not torch.equal(sampled(temperature=1.0), greedy)


def test_samples_come_from_the_nucleus_and_grow_wilder_with_temperature() -> None:
    model, prompt = float64_model(), TEXT[:1].expand(2000, -1)
    with torch.inference_mode():
        logits = model(TEXT[:1]).logits[0, -1]

    def frequencies(**options: float) -> Tensor:
        (tokens,) = generate_tokens(GeneralPath(model), prompt, max_new_tokens=1, sampling=Sampling(**options))
        return tokens.bincount(minlength=VOCABULARY) / len(tokens)

    for temperature in (0.5, 2.0):
        expected = (logits / temperature).softmax(dim=-1)
        assert torch.allclose(frequencies(temperature=temperature).double(), expected, atol=0.05)
    likely = logits.softmax(dim=-1).sort(descending=True)
    size = int((likely.values.cumsum(0) < 0.5).sum()) + 1
    drawn = frequencies(temperature=1.0, top_p=0.5).nonzero().flatten()
    assert set(drawn.tolist()) == set(likely.indices[:size].tolist())


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 1.0])
def test_the_nucleus_is_that_of_transformers(top_p: float) -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).mul(3).round(decimals=1)  # many alike
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(0.7)(None, logits))
    draw = Sampling(temperature=0.7, top_p=top_p, seed=1).chooser(torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        expected = torch.multinomial(warped.softmax(dim=-1), 1, generator=generator)[:, 0]
        assert torch.equal(draw(logits), expected)


@pytest.mark.parametrize("options", [{"temperature": -0.5}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 2}])
def test_impossible_sampling_is_refused_in_one_sentence(options: dict[str, float]) -> None:
    with pytest.raises(FfnskipError, match=r"^[^\n]+ must be [^\n]+\.$"):
        Sampling(**options)
