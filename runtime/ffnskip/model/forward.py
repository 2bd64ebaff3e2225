"""The model's own forward pass, in the arithmetic that the processor has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ffnskip.model.matrix import Matrix, plain

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


Product = Callable[[Matrix, Tensor], Tensor | None]
_product: ContextVar[Product | None] = ContextVar("product", default=None)


@contextmanager
def multiplied_by(product: Product | None) -> Iterator[None]:
    """Let `product` multiply matrices, ``W x + bias`` of rows ``x [..., columns]``, where it gives other than None.

    It is asked for packed layers always, and for those in bfloat16 in passes by `forward` on a CPU that record no
    gradients. PyTorch's products in float32 are about as fast.
    """
    token = _product.set(product)
    try:
        yield
    finally:
        _product.reset(token)


def product(matrix: Matrix, x: Tensor) -> Tensor | None:
    """What the product of `multiplied_by` gives; None where there is none, or it gives none.

    None, too, where PyTorch records what it does: it would not see a product of ours.
    """
    chosen = _product.get()
    return None if chosen is None or is_recorded() or not _is_plain(x) else chosen(matrix, x)


def is_recorded() -> bool:
    """Whether PyTorch records what it does, to do it again without Python: tracing, compiling, exporting."""
    return torch.compiler.is_compiling() or bool(torch._C._get_tracing_state())


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
    asks = model.dtype == torch.bfloat16 and _product.get() is not None
    return _Products(narrow) if narrow or asks else nullcontext()


@cache
def has_instructions(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix instructions for bfloat16 or float16."""
    mkldnn = torch.ops.mkldnn
    if dtype == torch.float16:
        return bool(mkldnn._is_mkldnn_fp16_supported())
    # With AVX-512 alone oneDNN says yes, and multiplies bfloat16 at a quarter of the speed of float32.
    lacking = torch.backends.cpu.get_cpu_capability() == "AVX512" and not torch.cpu._is_avx512_bf16_supported()
    return bool(mkldnn._is_mkldnn_bf16_supported()) and not lacking


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
        first = args[0] if args else kwargs.get("input", kwargs.get("query"))
        if not self._widens or first is None or first.dtype not in _NARROW:
            return func(*args, **kwargs)
        if first.numel() // max(first.shape[-1], 1) <= _ROWS:
            return func(*args, **kwargs)
        widened = {name: _widen(value) for name, value in kwargs.items()}
        return func(*map(_widen, args), **widened).to(first.dtype)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """By `product`; None for what only PyTorch multiplies as it should, or refuses as it should."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or input.dtype != torch.bfloat16:
        return None
    given = [tensor for tensor in (input, weight, bias) if tensor is not None]
    if not all(_is_plain(tensor) and tensor.dtype == input.dtype for tensor in given):
        return None
    fits = weight.dim() == 2 and weight.numel() > 0 and input.dim() > 0 and input.shape[-1] == weight.shape[1]
    if not fits or (bias is not None and not (bias.shape == weight.shape[:1] and bias.is_contiguous())):
        return None
    return product(plain(weight, bias), input)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is numbers in the CPU's memory and nothing else: no subclass, and nothing that is followed."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return not (wrapped or tensor.is_neg() or forward_ad._current_level >= 0)


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _NARROW else value
