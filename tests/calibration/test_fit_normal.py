"""Least squares from sums over a stream of tokens: what a solver that sees all tokens at once gives."""

import pytest
import torch
from torch import Tensor

from ffnskip_cli.calibration.fit.least_squares import RIDGES, NormalEquations, best_ridge

LAYERS, TOKENS, FEATURES, OUTPUTS = 2, 300, 7, 5


def data(noise: float = 0.3, seed: int = 0, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """``x [layers, tokens, features]``, the last one of them 1, and ``y [layers, tokens, outputs]``, linear in it."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([0.1, 10.0, 1.0, 3.0, 1.0, 1.0, 1.0])  # features differ in size, as a stream's do
    x = torch.randn(LAYERS, tokens, FEATURES, generator=generator) * sizes
    x[..., -1] = 1.0
    truth = torch.randn(LAYERS, FEATURES, OUTPUTS, generator=torch.Generator().manual_seed(9))
    return x, x @ truth + noise * torch.randn(LAYERS, tokens, OUTPUTS, generator=generator)


def sums_of(x: Tensor, y: Tensor, block: int = TOKENS) -> NormalEquations:
    sums = NormalEquations(LAYERS, x.shape[2], y.shape[2])
    for layer in range(LAYERS):
        for some_x, some_y in zip(x[layer].split(block), y[layer].split(block), strict=True):
            sums.add(layer, some_x, some_y)
    return sums


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
def test_the_solution_is_that_of_least_squares_with_rows_for_the_penalty(ridge: float) -> None:
    x, y = (part.double() for part in data())
    solved = sums_of(x.float(), y.float()).solve(ridge)
    for layer in range(LAYERS):
        own = x[layer].square().sum(dim=0)
        own[-1] = 0.0  # no penalty on the intercept
        rows = torch.cat([x[layer], torch.diag((ridge * own).sqrt())])
        targets = torch.cat([y[layer], torch.zeros(FEATURES, OUTPUTS, dtype=torch.float64)])
        expected = torch.linalg.lstsq(rows, targets).solution
        assert torch.allclose(solved[layer], expected, rtol=1e-4, atol=1e-5)


def test_blocks_of_any_size_give_the_same_as_all_tokens_at_once() -> None:
    x, y = data()
    whole = sums_of(x, y)
    for block in (1, 17, 128):
        parts = sums_of(x, y, block)
        for name in ("gram", "cross", "square"):
            assert torch.allclose(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-3)
        assert torch.allclose(parts.solve(1e-3), whole.solve(1e-3), rtol=1e-4, atol=1e-5)
    assert whole.count.tolist() == [TOKENS] * LAYERS


def test_small_blocks_are_not_lost_behind_a_large_sum() -> None:
    """As they would be in float32, which has no number between 2**24 and 2**24 + 2."""
    sums = NormalEquations(1, 1, 1)
    sums.add(0, torch.full((1, 1), 2.0**12), torch.full((1, 1), 2.0**12))
    for _ in range(5):
        sums.add(0, torch.ones(1, 1), torch.ones(1, 1))
    assert (float(sums.gram), float(sums.cross), float(sums.square)) == (2**24 + 5,) * 3


def test_the_errors_are_those_of_every_token_summed_up() -> None:
    x, y = data()
    other_x, other_y = data(seed=1)
    solved = sums_of(x, y).solve(1e-2)
    for some_x, some_y in ((x, y), (other_x, other_y)):
        direct = (some_y.double() - some_x.double() @ solved).square().sum(dim=1)
        sums = sums_of(some_x, some_y)
        assert bool(((sums.errors(solved) - direct).abs() <= 1e-5 * sums.square).all())


def test_blending_weighs_the_other_fits_tokens() -> None:
    (x, y), (other_x, other_y) = data(), data(seed=1)
    blended = sums_of(x, y)
    blended.blend(sums_of(other_x, other_y), 4.0)
    weighted = sums_of(torch.cat([x, 2 * other_x], dim=1), torch.cat([y, 2 * other_y], dim=1))
    assert torch.allclose(blended.solve(1e-3), weighted.solve(1e-3), rtol=1e-4, atol=1e-5)
    assert torch.allclose(blended.square, weighted.square)


def test_the_sums_of_some_features_are_those_of_a_fit_to_them_alone() -> None:
    x, y = data()
    features = torch.tensor([0, 2, 6])
    part, whole = sums_of(x[..., features], y), sums_of(x, y)
    assert torch.allclose(whole.select(features).solve(1e-3), part.solve(1e-3), rtol=1e-5)


def test_scaling_lets_every_token_count_less_and_changes_no_solution() -> None:
    x, y = data()
    scaled, plain = sums_of(x, y), sums_of(x, y)
    scaled.scale(0.25)
    assert scaled.count.tolist() == [TOKENS / 4] * LAYERS
    assert torch.allclose(scaled.solve(1e-3), plain.solve(1e-3), rtol=1e-9)


def test_a_layer_without_tokens_is_left_at_zero_and_a_dead_feature_does_no_harm() -> None:
    x, y = data()
    x[..., 2] = 0.0
    sums = NormalEquations(LAYERS, FEATURES, OUTPUTS)
    sums.add(0, x[0], y[0])
    solved = sums.solve(1e-3)
    assert bool(solved.isfinite().all())
    assert not solved[1].any()
    assert not solved[0, 2].any()
    assert float(sums.errors(solved)[0].sum()) < 0.1 * float(sums.square[0].sum())


def test_noise_asks_for_a_large_ridge_and_clean_data_for_a_small_one() -> None:
    def chosen(noise: float, tokens: int) -> float:
        return best_ridge(sums_of(*data(noise, tokens=tokens)), sums_of(*data(noise, seed=1)))

    assert chosen(0.0, TOKENS) == min(RIDGES)
    assert chosen(1000.0, 10) == max(RIDGES)
