"""Weight matrices in four formats: what packing keeps, and what shares memory."""

import pytest
import torch
from torch import Tensor

from ffnskip import FfnskipError
from ffnskip.model.matrix import Matrix, pack, plain, stack


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_plain_matrices_share_memory_with_the_weights() -> None:
    weight = random(5, 7).bfloat16()
    matrix = plain(weight)
    assert (matrix.format, matrix.rows, matrix.columns, matrix.nbytes) == ("bfloat16", 5, 7, 70)
    assert matrix.data.data_ptr() == weight.data_ptr()
    assert torch.equal(matrix.unpack(torch.float32), weight.float())


def test_int8_is_within_half_a_step_of_each_row() -> None:
    weight = random(6, 40) * torch.tensor([1e-3, 1.0, 50.0, 1.0, 0.0, 1.0])[:, None]
    matrix = pack(weight, "int8")
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((matrix.unpack(torch.float32) - weight).abs() <= step * 0.5001).all()
    assert matrix.nbytes == 6 * 40 + 6 * 4


def nearest_levels(weight: Tensor) -> Tensor:
    """Each group of 32 on sixteen levels from its least to its largest number."""
    groups = weight.unflatten(1, (-1, 32))
    lowest, highest = groups.aminmax(dim=2, keepdim=True)
    step = (highest - lowest) / 15
    return (((groups - lowest) / step).round() * step + lowest).flatten(1)


def test_int4_comes_closer_than_levels_from_the_least_to_the_largest_number() -> None:
    weight = random(64, 64) + 2.0  # all of one sign, as an offset must carry
    matrix = pack(weight, "int4")
    error = (matrix.unpack(torch.float32) - weight).square().mean()
    assert error < 0.9 * (nearest_levels(weight) - weight).square().mean()
    assert (matrix.columns, matrix.nbytes) == (64, 64 * (32 + 2 * 2 * 2))


def test_int4_keeps_what_is_on_sixteen_levels() -> None:
    weight = nearest_levels(random(16, 64))
    assert torch.allclose(pack(weight, "int4").unpack(torch.float32), weight, atol=2e-3)  # float16 factor and offset


def test_int4_by_input_is_the_same_numbers() -> None:
    matrix = pack(random(192, 96), "int4")
    turned = matrix.turned(by_input=True)
    assert (turned.rows, turned.columns, turned.nbytes) == (192, 96, matrix.nbytes)
    assert torch.equal(turned.unpack(torch.float32), matrix.unpack(torch.float32))
    assert torch.equal(turned[64:192].unpack(torch.float32), matrix[64:192].unpack(torch.float32))
    assert torch.equal(turned.turned(by_input=False).data, matrix.data)
    with pytest.raises(FfnskipError, match="in multiples of 64, not 96"):
        pack(random(96, 96), "int4").turned(by_input=True)


def test_int4_keeps_best_what_meets_the_largest_inputs() -> None:
    weight, inputs = random(64, 64), torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 8
    errors = [(pack(weight, "int4", inputs=i).unpack(torch.float32) - weight).square() for i in (None, inputs)]
    alike, weighted = (float((error * inputs).mean()) for error in errors)
    assert weighted < 0.7 * alike


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_constant_rows_stay_what_they_are(format: str, value: float) -> None:
    matrix = pack(torch.full((2, 32), value), format)  # type: ignore[arg-type]
    assert torch.allclose(matrix.unpack(torch.float32), torch.full((2, 32), value), rtol=1e-6)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_rows_of_a_packed_matrix_are_the_same_numbers(format: str) -> None:
    matrix = pack(random(8, 32), format, bias=torch.arange(8.0))  # type: ignore[arg-type]
    part = matrix[2:5]
    assert torch.equal(part.unpack(torch.float32), matrix.unpack(torch.float32)[2:5])
    assert part.bias is not None
    assert part.bias.tolist() == [2, 3, 4]
    assert part.data.untyped_storage().data_ptr() == matrix.data.untyped_storage().data_ptr()


@pytest.mark.parametrize("format", ["float32", "int8", "int4"])
def test_stacking_keeps_numbers_and_a_second_time_copies_nothing(format: str) -> None:
    made = [plain(w) if format == "float32" else pack(w, format) for w in (random(4, 32), random(6, 32, 1))]  # type: ignore[arg-type]
    whole = stack(made)
    assert torch.equal(whole.unpack(torch.float32), torch.cat([m.unpack(torch.float32) for m in made]))
    again = stack([whole[:4], whole[4:]])
    assert again.data.data_ptr() == whole.data.data_ptr()
    assert torch.equal(again.unpack(torch.float32), whole.unpack(torch.float32))


def test_a_stack_has_a_bias_where_one_of_its_parts_has() -> None:
    whole = stack([Matrix("float32", random(2, 4), bias=torch.ones(2)), Matrix("float32", random(3, 4))])
    assert whole.bias is not None
    assert whole.bias.tolist() == [1, 1, 0, 0, 0]
    assert stack([Matrix("float32", random(2, 4))]).bias is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: plain(random(2, 4).half()), "reads float32 and bfloat16, not float16"),
        (lambda: pack(random(2, 48), "int4"), "multiple of 32 numbers, not 48: choose int8"),
        (lambda: pack(random(2, 32), "int3"), "packed to int8 or int4, not 'int3'"),  # type: ignore[arg-type]
    ],
)
def test_what_has_no_format_is_refused(make: object, message: str) -> None:
    with pytest.raises(FfnskipError, match=message):
        make()  # type: ignore[operator]
