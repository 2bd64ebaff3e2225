"""From least squares to the tensors of a compensation."""

import pytest
import torch
from support.factories import make_profile
from support.pico import HIDDEN, pico_model
from torch import Tensor, nn

from ffnskip.compensation.compensator import Compensator
from ffnskip.compensation.kinds import BIAS, DOWN, FIRST, LINEAR, NEURONS, SECOND, tensor_shapes
from ffnskip.model.neurons import activations
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.schema import Compensation
from ffnskip.profiles.weights import Weights
from ffnskip_cli.calibration.fit.least_squares import Features, NeuronChoice, NormalEquations, solve_map

TOKENS, NEURONS_USED, RIDGE = 600, torch.tensor([[3, 17, 40, 41]]), 1e-6


def ffn_of_pico() -> nn.Module:
    return ffn_sites(pico_model())[2].ffn


def inputs() -> Tensor:
    """``[tokens, hidden]`` whose directions have very different sizes, and a mean."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    rotation = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator)).Q
    return x * torch.logspace(-0.7, 0.5, HIDDEN) @ rotation + 0.2


def fitted(kind: str, x: Tensor, f: Tensor, rank: int | None = None, index: Tensor | None = None) -> dict[str, Tensor]:
    compensation = Compensation(kind=kind, rank=rank, neurons=0 if index is None else index.shape[1])
    features = Features(compensation, ffn_of_pico(), None if index is None else index[0])
    sums = NormalEquations(1, features.count(HIDDEN), HIDDEN)
    sums.add(0, features(x), f)
    tensors = solve_map(sums, RIDGE, compensation, index)
    assert {name: tuple(t.shape[1:]) for name, t in tensors.items()} == tensor_shapes(compensation, HIDDEN)
    return tensors


def g(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    kind = "linear" if LINEAR in tensors else "low-rank" if FIRST in tensors else "mean"
    rank, neurons = (tensors[name].shape[1] if name in tensors else 0 for name in (FIRST, NEURONS))
    compensation = Compensation(kind=kind, rank=rank or None, neurons=neurons)
    profile = make_profile(cold_s=0, cold_e=1).model_copy(update={"compensation": compensation})
    return Compensator(profile.with_weights(Weights(tensors)), 0, ffn_of_pico()).added(x)


def error(tensors: dict[str, Tensor], x: Tensor, f: Tensor) -> float:
    return float((f - g(tensors, x)).square().sum())


@torch.no_grad()
def ffn_data() -> tuple[Tensor, Tensor]:
    x = inputs()
    return x, ffn_of_pico()(x)


def test_nothing_is_solved_where_nothing_is_added_and_the_mean_is_the_mean() -> None:
    x, f = ffn_data()
    assert fitted("none", x, f) == {}
    assert torch.allclose(fitted("mean", x, f)[BIAS][0], f.mean(dim=0), atol=1e-5)


def test_a_linear_map_is_that_of_least_squares() -> None:
    x, f = ffn_data()
    tensors = fitted("linear", x, f)
    with_one = torch.cat([x, torch.ones(TOKENS, 1)], dim=1).double()
    solution = torch.linalg.lstsq(with_one, f.double()).solution
    assert torch.allclose(tensors[LINEAR][0].double(), solution[:-1].T, atol=1e-3)
    assert torch.allclose(tensors[BIAS][0].double(), solution[-1], atol=1e-3)


@pytest.mark.parametrize("index", [None, NEURONS_USED], ids=["alone", "with neurons"])
def test_at_full_rank_a_low_rank_map_is_the_linear_one(index: Tensor | None) -> None:
    x, f = ffn_data()
    whole, thin = fitted("linear", x, f, index=index), fitted("low-rank", x, f, HIDDEN, index)
    assert torch.allclose(g(thin, x), g(whole, x), atol=5e-3)
    assert torch.allclose(thin[SECOND][0] @ thin[FIRST][0], whole[LINEAR][0], atol=2e-2)


@pytest.mark.parametrize("index", [None, NEURONS_USED], ids=["alone", "with neurons"])
def test_no_other_map_of_the_rank_has_a_smaller_error(index: Tensor | None) -> None:
    x, f = ffn_data()
    best = fitted("low-rank", x, f, 4, index)
    least = error(best, x, f)
    others = other_features(x, index)
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        scale = (0.01, 0.1, 1.0)[seed % 3]  # near the solution and far from it
        first, second = (
            best[name][0] + scale * best[name].std() * torch.randn(best[name][0].shape, generator=generator)
            for name in (FIRST, SECOND)
        )
        left = f - x @ first.T @ second.T
        left -= others @ torch.linalg.lstsq(others, left).solution  # with the best neurons and intercept for it
        assert float(left.square().sum()) > least


def other_features(x: Tensor, index: Tensor | None) -> Tensor:
    """Those besides ``x`` itself."""
    ones = torch.ones(len(x), 1)
    if index is None:
        return ones
    with torch.no_grad():
        return torch.cat([activations(ffn_of_pico(), x)[:, index[0]], ones], dim=1)


def test_neurons_and_intercept_are_fitted_anew_to_what_the_low_rank_map_leaves() -> None:
    x, f = ffn_data()
    tensors = fitted("low-rank", x, f, 4, NEURONS_USED)
    assert tensors[NEURONS].tolist() == NEURONS_USED.tolist()
    left = f - g(tensors, x)
    others = other_features(x, NEURONS_USED)
    # Nothing that is left is a linear function of them.
    products = (others.T @ left) / (others.norm(dim=0)[:, None] * f.norm(dim=0))
    assert float(products.abs().max()) < 1e-3
    of_whole = fitted("linear", x, f, index=NEURONS_USED)
    assert not torch.allclose(tensors[DOWN], of_whole[DOWN], atol=1e-2)


def planted() -> tuple[nn.Module, Tensor]:
    """An FFN in whose input only neuron 7 is far from linear, and a Fisher matrix for which 11 is harmless."""
    ffn = ffn_of_pico()
    with torch.no_grad():
        gate, up = ffn.get_submodule("gate_proj"), ffn.get_submodule("up_proj")
        gate.weight.mul_(0.01)  # silu is linear near 0, but up * gate is not: so both are nearly nothing
        up.weight.mul_(0.01)
        for neuron in (7, 11):
            gate.weight[neuron] *= 300.0
            up.weight[neuron] *= 300.0
        down = ffn.get_submodule("down_proj").weight
        down[:, 11] = 0.0
        down[0, 11] = 10.0  # a large change, in a direction that changes no prediction
    fisher = torch.eye(HIDDEN)
    fisher[0] = fisher[:, 0] = 0.0
    return ffn, fisher


def test_the_neuron_that_is_nonlinear_and_does_harm_is_chosen() -> None:
    ffn, fisher = planted()
    choice = NeuronChoice([ffn, ffn], HIDDEN)
    for place in range(2):
        for block in inputs().split(128):
            with torch.no_grad():
                choice.add(place, block)
    assert choice.choose(1, torch.stack([fisher, fisher])).tolist() == [[7], [7]]
    blind = torch.stack([torch.eye(HIDDEN)] * 2)
    assert [set(row) for row in choice.choose(2, blind).tolist()] == [{7, 11}, {7, 11}]
    assert choice.choose(1, blind).tolist() == [[11], [11]]
