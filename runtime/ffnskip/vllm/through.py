"""The operator that stands in a graph where a profile decides.

What a profile does depends on the data: it looks at its tokens and runs what does not skip. torch.compile can trace no
such thing and a CUDA graph can hold none, so both see one opaque operator, at which vLLM cuts its graphs
(`splitting_ops`). It writes into a tensor that it is given, as vLLM's attention does: a recorded graph reads from fixed
addresses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, library

OPERATOR = "ffnskip::through"

_PLACES: dict[str, Callable[[Tensor], Tensor]] = {}


def put(place: str, run: Callable[[Tensor], Tensor]) -> None:
    """Have `run` stand at a place. A model loaded later in the same process takes the places of the one before."""
    _PLACES[place] = run


def through(x: Tensor, place: str) -> Tensor:
    """What stands at `place` makes of ``x [tokens, width]``: as many numbers."""
    if not torch.compiler.is_compiling():
        return _PLACES[place](x)
    output = torch.empty_like(x)
    torch.ops.ffnskip.through(x, output, place)
    return output


@library.custom_op(OPERATOR, mutates_args=("output",))
def _through(x: Tensor, output: Tensor, place: str) -> None:
    output.copy_(_PLACES[place](x))


@_through.register_fake
def _nothing(x: Tensor, output: Tensor, place: str) -> None: ...
