"""Matrices of GGUF files in packed form: the same numbers, bit for bit where the format can hold them."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from support.compiler import needs_compiler
from support.gguf_files import blocks
from torch import Tensor

from ffnskip.fast.products import multiply
from ffnskip.model.gguf_blocks import Stored

SHAPE = (70, 512)
KINDS = (Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q8_0, Kind.Q6_K, Kind.Q5_0, Kind.F16, Kind.BF16, Kind.F32)


def stored(kind: Kind, shape: tuple[int, int] = SHAPE) -> tuple[Stored, Tensor]:
    """A matrix in blocks, and its numbers as the library reads them."""
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    data = blocks(values, kind)
    return Stored(data, kind, shape), torch.from_numpy(gguf.quants.dequantize(data, kind))


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1])
@pytest.mark.parametrize("shape", [SHAPE, (600, 4096)])  # the latter is converted in parts
def test_four_bits_are_kept_bit_for_bit(kind: Kind, shape: tuple[int, int]) -> None:
    matrix, numbers = stored(kind, shape)
    packed = matrix.packed()
    assert packed.format == "int4"
    assert torch.equal(packed.unpack(torch.float32), numbers)


def test_four_bits_with_products_as_scales_are_rounded_to_float16() -> None:
    matrix, numbers = stored(Kind.Q4_K)
    packed = matrix.packed()
    assert packed.format == "int4"
    groups, error = numbers.unflatten(1, (-1, 32)), (packed.unpack(torch.float32) - numbers).unflatten(1, (-1, 32))
    largest = groups.abs().amax(dim=2, keepdim=True) + 16 * (
        groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)
    )
    assert (error.abs() <= 2.0**-11 * largest + 2.0**-23).all()


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q6_K, Kind.Q5_0, Kind.F16, Kind.BF16, Kind.F32])
def test_other_types_are_rounded_to_8_bits_per_row(kind: Kind) -> None:
    matrix, numbers = stored(kind)
    packed = matrix.packed(bias=torch.ones(len(numbers)))
    step = numbers.abs().amax(dim=1, keepdim=True) / 127
    assert packed.format == "int8"
    assert ((packed.unpack(torch.float32) - numbers).abs() <= 0.5001 * step).all()
    assert packed.bias is not None
    assert packed.bias.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_single_numbers_are_read_alone(kind: Kind) -> None:
    matrix, numbers = stored(kind)
    row, column = torch.arange(70), torch.arange(70) * 7 % 512
    assert torch.equal(matrix.at(row, column), numbers[row, column])
    assert torch.equal(matrix.unpacked(), numbers)


@needs_compiler
@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q4_K])
def test_products_are_those_of_the_numbers(kind: Kind, by_input: bool) -> None:
    matrix, numbers = stored(kind, (128, 512))
    packed = matrix.packed().turned(by_input)
    if by_input:
        packed = packed.map(lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1))
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    product, expected = multiply(packed, x), x @ numbers.T
    assert product is not None
    assert (product - expected).norm() < 2e-3 * expected.norm()


def test_memory_goes_back_where_a_matrix_is_no_more() -> None:
    packed = stored(Kind.Q4_0)[0].packed()
    assert packed.data.is_contiguous()
    packed.data[0, 0] = 3  # it is no view of the file
    assert packed.data[0, 0] == 3
