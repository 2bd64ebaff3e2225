"""Products of packed matrices with many vectors: as good as unpacking, and what a prompt of a packed model takes."""

import pytest
import torch
from support.compiler import needs_compiler
from support.pico import pico_model, pico_tokens

from ffnskip import pack_weights
from ffnskip.fast.engine import FusedEngine
from ffnskip.fast.products import multiply
from ffnskip.model.matrix import Matrix, PackedFormat, pack
from ffnskip.model.packed import multiplied_by

pytestmark = needs_compiler


@pytest.mark.parametrize("n", [1, 5, 37])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("format", "by_input"), [("int8", False), ("int4", False), ("int4", True)])
def test_they_are_those_of_the_unpacked_numbers(format: PackedFormat, by_input: bool, threads: int, n: int) -> None:
    torch.manual_seed(0)
    matrix = pack(torch.randn(192, 96), format, torch.randn(192)).turned(by_input)
    if by_input:
        matrix = matrix.map(lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1))
    x, before = torch.randn(2, n, 96), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        product = multiply(matrix, x)
    finally:
        torch.set_num_threads(before)
    assert product is not None
    assert matrix.bias is not None
    assert torch.allclose(product, x @ matrix.unpack(torch.float32).T + matrix.bias, atol=2e-2)


def test_eight_bits_that_lie_input_by_input_are_unpacked() -> None:
    matrix = pack(torch.randn(64, 32), "int8").map(lambda t: t.T.contiguous().T if t.dim() == 2 else t)
    assert multiply(matrix, torch.randn(3, 32)) is None


def test_a_prompt_is_read_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico_model(hidden_size=64, intermediate_size=192, num_key_value_heads=4, head_dim=16)
    pack_weights(model, "int4")
    text = pico_tokens(20)
    expected = model(text).logits[:, -1].detach()
    engine = FusedEngine(model, None)
    monkeypatch.delattr(Matrix, "unpack")
    logits = engine.prefill(text, None, engine.step(1, 20).cache)
    assert torch.allclose(logits, expected, atol=2e-3 * float(expected.abs().max()))


def test_a_product_may_leave_a_matrix_to_unpacking() -> None:
    model = pico_model(intermediate_size=64)
    pack_weights(model, "int8")
    text, seen = pico_tokens(5), []
    expected = model(text).logits
    with multiplied_by(lambda matrix, x: seen.append(matrix)):  # type: ignore[func-returns-value]
        assert torch.equal(model(text).logits, expected)
    assert seen
