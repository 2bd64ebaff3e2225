"""The kinds of compensation: which tensors each needs, what it computes and what that costs.

A skipped FFN's output ``f`` is approximated from the FFN's own input ``x`` by

    g(x) = W x + D a(x) + b

where ``W`` is the zero matrix (`mean`), a whole one (`linear`), or the product of two thin ones (`low-rank`), and
``a(x)`` are the activations of a few of the FFN's own neurons, whose down projection ``D`` has been fitted anew to make
up for the others. The rows of gate and up projection that ``a`` needs are those of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

BIAS, LINEAR, FIRST, SECOND = "bias", "linear", "low_rank.first", "low_rank.second"
NEURONS, DOWN = "neurons.index", "neurons.down"


class Compensation(Protocol):
    """Kind and size of a compensation: what is needed of a profile's section of that name."""

    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def rank(self) -> int | None: ...  # noqa: D102
    @property
    def neurons(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Kind:
    """A kind of compensation, without the neurons that may stand beside it.

    Attributes:
        name: as in the profile's `compensation.kind`.
        adds: whether it adds anything, which is at least the bias.
        reads_input: whether it is a map of the FFN's input, beside which neurons may run.
        has_rank: whether the map has a rank.
    """

    name: str
    adds: bool = True
    reads_input: bool = False
    has_rank: bool = False

    def matrices(self, hidden: int, rank: int | None) -> dict[str, tuple[int, int]]:
        """The shapes of one layer's matrices, by name, in the order in which ``x`` passes them."""
        if not self.reads_input:
            return {}
        return {LINEAR: (hidden, hidden)} if rank is None else {FIRST: (rank, hidden), SECOND: (hidden, rank)}

    def map(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """``W x + b``, ``[n, hidden]``, for ``x [n, hidden]``."""
        import torch.nn.functional as F

        if not self.reads_input:
            return tensors[BIAS].expand_as(x)
        if self.has_rank:
            return F.linear(F.linear(x, tensors[FIRST]), tensors[SECOND], tensors[BIAS])
        return F.linear(x, tensors[LINEAR], tensors[BIAS])

    def words(self, rank: int | None) -> str:
        """What is added, in words."""
        if not self.reads_input:
            return "its mean" if self.adds else "nothing"
        return (
            f"an affine map of rank {rank} of the FFN's input" if self.has_rank else "a linear map of the FFN's input"
        )


KINDS = {
    kind.name: kind
    for kind in (
        Kind("none", adds=False),
        Kind("mean"),
        Kind("linear", reads_input=True),
        Kind("low-rank", reads_input=True, has_rank=True),
    )
}


def tensor_shapes(compensation: Compensation, hidden: int) -> dict[str, tuple[int, ...]]:
    """The tensors that one layer's compensation needs, by name."""
    kind, neurons = KINDS[compensation.kind], compensation.neurons
    shapes: dict[str, tuple[int, ...]] = {BIAS: (hidden,)} if kind.adds else {}
    shapes |= kind.matrices(hidden, compensation.rank)
    return shapes | ({NEURONS: (neurons,), DOWN: (hidden, neurons)} if neurons else {})


def weights_read(compensation: Compensation, hidden: int) -> tuple[int, int, int]:
    """Weights that one skipped FFN reads: of the model's own rows, in matrices of the compensation, and in its bias."""
    shapes = tensor_shapes(compensation, hidden)
    matrices = sum(prod(shape) for shape in shapes.values() if len(shape) == 2)
    return 2 * hidden * compensation.neurons, matrices, hidden * (BIAS in shapes)


def compensation_name(compensation: Compensation) -> str:
    """Kind and size, short: `low-rank 96 + 256 neurons`."""
    size = f" {compensation.rank}" if compensation.rank is not None else ""
    neurons = f" + {compensation.neurons:,} neuron{'s' * (compensation.neurons != 1)}" if compensation.neurons else ""
    return f"{compensation.kind}{size}{neurons}"
