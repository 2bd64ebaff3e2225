"""The model's own forward pass, in the arithmetic that the processor has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ffnskip.model.matrix import Matrix, plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NARROW = (torch.bfloat16, torch.float16)
_MULTIPLIED = (torch.float32, torch.bfloat16)
_PRODUCTS = frozenset(
    (
        functional.linear,
        functional.scaled_dot_product_attention,
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
    )
)
_ROWS = 4  # up to so many rows, converting a matrix takes longer than multiplying with it


Product = Callable[[Matrix, Tensor], Tensor | None]
_product: ContextVar[Product | None] = ContextVar("product", default=None)


@contextmanager
def multiplied_by(product: Product | None) -> Iterator[None]:
    """Let `product` multiply matrices, ``W x + bias`` of rows ``x [..., columns]``, where it gives other than None.

    It is asked for packed layers always, and for others in passes by `forward` on a CPU that record no gradients.
    """
    token = _product.set(product)
    try:
        yield
    finally:
        _product.reset(token)


def product(matrix: Matrix, x: Tensor) -> Tensor | None:
    """What the product of `multiplied_by` gives; None where there is none, or it gives none."""
    chosen = _product.get()
    return None if chosen is None else chosen(matrix, x)


def forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """What ``model(*args, **kwargs)`` gives, with `fast_products`."""
    with fast_products(model):
        return model(*args, **kwargs)


def fast_products(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """A context for passes of the model on a CPU, by `multiplied_by` where that is set.

    Without 16-bit matrix instructions PyTorch takes about seven times as long for products of 16-bit numbers, and
    thirty times for their gradients, as for those of float32. There each product with several rows is taken in float32,
    of the same numbers, and rounded back.
    """
    if model.device.type != "cpu":
        return nullcontext()
    narrow = model.dtype in _NARROW and not has_instructions(model.dtype)
    return _Products(narrow) if narrow or _product.get() is not None else nullcontext()


@cache
def has_instructions(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix instructions for bfloat16 or float16."""
    mkldnn = torch.ops.mkldnn
    supported = mkldnn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported
    return bool(supported())


class _Products(TorchFunctionMode):
    def __init__(self, widens: bool) -> None:
        super().__init__()
        self._widens = widens

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS:
            return func(*args, **kwargs)
        if func is functional.linear and (y := _linear(*args, **kwargs)) is not None:
            return y
        dtype, rows = args[0].dtype, args[0].numel() // max(args[0].shape[-1], 1)
        if not self._widens or dtype not in _NARROW or rows <= _ROWS:
            return func(*args, **kwargs)
        return func(*map(_widen, args), **{name: _widen(value) for name, value in kwargs.items()}).to(dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """By `product`; None for what only PyTorch multiplies as it should: subclasses of tensors, autocast, gradients."""
    plainly = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter) and x.dtype == weight.dtype in _MULTIPLIED
    if not plainly or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    return product(plain(weight, bias), x)


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _NARROW else value
