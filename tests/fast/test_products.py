"""Products with many vectors, as reading a prompt takes: as good as PyTorch's, whatever the weights are stored as."""

import ctypes
from collections.abc import Iterator
from itertools import product as combinations

import pytest
import torch
from support.compiler import needs_compiler
from support.pico import pico_model, pico_tokens
from torch.nn.functional import linear

from ffnskip import pack_weights
from ffnskip.fast import build, products
from ffnskip.fast.engine import FusedEngine
from ffnskip.fast.fused_forward import FusedForward
from ffnskip.fast.products import multiply
from ffnskip.model.forward import fast_products, forward, multiplied_by
from ffnskip.model.matrix import Matrix, pack, plain

pytestmark = needs_compiler

BY_ROW, BY_INPUT = False, True
FORMATS = ("float32", "bfloat16", "int8", "int4")


@pytest.fixture(autouse=True)
def every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """On whatever processor the tests run, all products are those that are tested."""
    monkeypatch.setattr(products, "_pays", lambda matrix, n: True)


@pytest.fixture(scope="module")
def plain_library() -> Iterator[ctypes.CDLL]:
    """What is compiled where there are no vector instructions that the code knows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_vector_flags", tuple)
        yield build._load.__wrapped__()


def matrix_of(format: str, rows: int, columns: int, by_input: bool) -> Matrix:
    weight, bias = torch.randn(rows, columns), torch.randn(rows)
    if format in ("float32", "bfloat16"):
        matrix = plain(weight.to(getattr(torch, format)), bias)
    else:
        matrix = pack(weight, format, bias).turned(by_input)  # type: ignore[arg-type]
    return (
        matrix.map(
            lambda t: (
                t.T.contiguous().T
                if t.dim() == 2
                else t.transpose(0, 1).contiguous().transpose(0, 1)
                if t.dim() == 3
                else t
            )
        )
        if by_input
        else matrix
    )


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("n", [1, 5, 37, 150])
@pytest.mark.parametrize(("format", "by_input"), combinations(FORMATS, (BY_ROW, BY_INPUT)))
@pytest.mark.usefixtures("threads")
def test_they_are_those_of_the_unpacked_numbers(format: str, by_input: bool, n: int) -> None:
    torch.manual_seed(0)
    odd = [] if format == "int4" else [(19, 35), (40, 257)]
    for rows, columns in [(192, 96), (64, 608), *odd]:
        matrix, x = matrix_of(format, rows, columns, by_input), torch.randn(2, n, columns)
        product = multiply(matrix, x)
        assert product is not None
        assert matrix.bias is not None
        expected = x @ matrix.unpack(torch.float32).T + matrix.bias
        assert (product - expected).norm() < 1e-4 * expected.norm(), (rows, columns)


@pytest.mark.parametrize(("format", "by_input"), combinations(FORMATS, (BY_ROW, BY_INPUT)))
def test_they_are_the_same_without_vector_instructions(
    format: str, by_input: bool, plain_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, x = matrix_of(format, 64, 320, by_input), torch.randn(9, 320)
    expected = multiply(matrix, x)
    monkeypatch.setattr(products, "step_library", lambda: plain_library)
    product = multiply(matrix, x)
    assert expected is not None
    assert product is not None
    assert (product - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("n", [3, 140])
@pytest.mark.parametrize("format", FORMATS)
def test_vectors_in_bfloat16_give_products_in_bfloat16(format: str, n: int) -> None:
    matrix, x = matrix_of(format, 64, 96, BY_ROW), torch.randn(n, 96).bfloat16()
    product, exact = multiply(matrix, x), multiply(matrix, x.float())
    assert product is not None
    assert exact is not None
    assert torch.equal(product, exact.bfloat16())


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_a_number_stays_so_and_spoils_no_other_vector(format: str) -> None:
    matrix, x = matrix_of(format, 64, 64, BY_ROW), torch.randn(9, 64)
    x[4, 7] = torch.inf
    product = multiply(matrix, x)
    assert product is not None
    assert not product[4].isfinite().any()
    assert product[[3, 5]].isfinite().all()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_prompt_is_read_without_unpacking(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico_model(hidden_size=64, intermediate_size=192, num_key_value_heads=4, head_dim=16)
    pack_weights(model, format)  # type: ignore[arg-type]
    text = pico_tokens(20)
    expected = model(text).logits[:, -1].detach()
    engine = FusedEngine(model, None)
    monkeypatch.delattr(Matrix, "unpack")
    logits = engine.prefill(text, None, engine.step(1, 20))
    assert torch.allclose(logits, expected, atol=2e-3 * float(expected.abs().max()))


def test_layers_in_bfloat16_are_multiplied_so_in_passes_without_gradients() -> None:
    model, text = pico_model(dtype=torch.bfloat16), pico_tokens(20)
    asked: list[Matrix] = []

    def asking(matrix: Matrix, x: torch.Tensor) -> torch.Tensor | None:
        asked.append(matrix)
        return multiply(matrix, x)

    with torch.no_grad():
        expected = model(text).logits.float()
        with multiplied_by(asking):
            found = forward(model, text).logits.float()
    n_matrices = 7 * len(model.model.layers) + 1
    assert len(asked) == n_matrices
    assert (found - expected).norm() < 0.02 * expected.norm()
    with multiplied_by(asking):
        forward(model, text, labels=text).loss.backward()
    assert len(asked) == n_matrices
    assert model.lm_head.weight.grad is not None


WEIGHT, BIAS, X = torch.randn(12, 16).bfloat16(), torch.randn(12, 2).bfloat16(), torch.randn(5, 16).bfloat16()


@pytest.mark.parametrize(
    "arguments",
    [
        {"bias": BIAS[:, 1]},
        {"bias": BIAS[:1, 0]},
        {"bias": BIAS[:1, 0].expand(12)},
        {"weight": WEIGHT[0]},
        {"weight": torch.zeros(12, 0).bfloat16(), "input": torch.zeros(5, 0).bfloat16()},
        {"input": X.to("meta"), "weight": WEIGHT.to("meta")},
        {"input": torch._neg_view(X)},
    ],
    ids=["a bias with a stride", "one bias", "one bias for all", "a vector", "nothing", "meta", "a view that negates"],
)
def test_unusual_layers_are_multiplied_as_pytorch_does(arguments: dict[str, torch.Tensor]) -> None:
    given = {"input": X, "weight": WEIGHT} | arguments
    with torch.no_grad(), multiplied_by(multiply):
        expected = linear(**given)
        with fast_products(pico_model(dtype=torch.bfloat16)):
            found = linear(**given)
    assert found.shape == expected.shape
    assert found.is_meta or torch.allclose(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("wrong", [{"bias": BIAS[:5, 0]}, {"weight": WEIGHT[:, :8]}], ids=["bias", "weight"])
def test_what_does_not_fit_is_refused_as_pytorch_does(wrong: dict[str, torch.Tensor]) -> None:
    passes = fast_products(pico_model(dtype=torch.bfloat16))
    with torch.no_grad(), multiplied_by(multiply), passes, pytest.raises(RuntimeError):
        linear(**({"input": X, "weight": WEIGHT} | wrong))


@pytest.mark.parametrize("format", ["bfloat16", "int8"])
def test_a_traced_or_compiled_model_is_the_models_own(format: str) -> None:
    model, text, other = pico_model(dtype=torch.bfloat16, use_cache=False), pico_tokens(20), pico_tokens(20, seed=1)
    model.requires_grad_(False)
    if format == "int8":
        pack_weights(model, "int8")
    with torch.no_grad(), FusedForward(model, None).install():
        expected = model(other).logits
        traced = torch.jit.trace(lambda tokens: model(tokens).logits, text, check_trace=False)
        compiled = torch.compile(lambda tokens: model(tokens).logits, backend="eager")
        for found in (traced(other), compiled(other)):
            assert (found - expected).norm() < 0.03 * expected.norm()


def test_autocast_and_products_with_nothing_are_left_to_pytorch() -> None:
    model, text = pico_model(dtype=torch.bfloat16), pico_tokens(20)
    asked: list[Matrix] = []
    with torch.no_grad(), multiplied_by(lambda matrix, x: asked.append(matrix)):  # type: ignore[func-returns-value]
        with torch.autocast("cpu", torch.bfloat16):
            assert forward(model, text).logits.dtype == torch.bfloat16
        assert not asked
    assert multiply(matrix_of("int8", 64, 64, BY_ROW), torch.zeros(0, 64)) is None


def test_a_product_may_leave_a_matrix_to_pytorch() -> None:
    model = pico_model(intermediate_size=64)
    pack_weights(model, "int8")
    text, seen = pico_tokens(5), []
    expected = model(text).logits
    with multiplied_by(lambda matrix, x: seen.append(matrix)):  # type: ignore[func-returns-value]
        assert torch.equal(model(text).logits, expected)
    assert seen
