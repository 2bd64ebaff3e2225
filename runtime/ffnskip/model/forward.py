"""The model's own forward pass, in the arithmetic that the processor has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NARROW = (torch.bfloat16, torch.float16)
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


def forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """What ``model(*args, **kwargs)`` gives, with `wide_products`."""
    with wide_products(model):
        return model(*args, **kwargs)


def wide_products(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """A context for passes of the model.

    On a CPU without 16-bit matrix instructions PyTorch takes about seven times as long for products of 16-bit numbers,
    and thirty times for their gradients, as for those of float32. There each product with several rows is taken in
    float32, of the same numbers, and rounded back.
    """
    narrow = model.device.type == "cpu" and model.dtype in _NARROW and not has_instructions(model.dtype)
    return _InFloat32() if narrow else nullcontext()


@cache
def has_instructions(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix instructions for bfloat16 or float16."""
    mkldnn = torch.ops.mkldnn
    supported = mkldnn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported
    return bool(supported())


class _InFloat32(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS:
            return func(*args, **kwargs)
        dtype, rows = args[0].dtype, args[0].numel() // max(args[0].shape[-1], 1)
        if dtype not in _NARROW or rows <= _ROWS:
            return func(*args, **kwargs)
        return func(*map(_widen, args), **{name: _widen(value) for name, value in kwargs.items()}).to(dtype)


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _NARROW else value
