"""What happens on the model's own text: tokens that never skip, and loops.

A ratio is an average. `never_skip_fraction` is its dark side, the share of generated tokens that ran every FFN and so
cost more than without a profile (the paper's Table 6). And a damaged model often shows first by repeating itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.stats import SkipStats
from ffnskip_cli.measure.quality import repetition
from ffnskip_cli.progress import Track

if TYPE_CHECKING:
    from ffnskip.decoder import Decoder

_ROWS = 16  # prompts that are continued side by side


@dataclass(frozen=True)
class Continuation:
    """Greedy continuations of a set of prompts.

    Attributes:
        tokens: ``[prompts, new_tokens]``.
        stats: what was skipped; None for the dense model.
    """

    tokens: Tensor
    stats: SkipStats | None

    @property
    def repetition(self) -> float:
        """See `ffnskip_cli.measure.quality.repetition`."""
        return repetition(self.tokens)


def continue_prompts(decoder: Decoder, prompts: Tensor, new_tokens: int, track: Track) -> Continuation:
    """Continue ``prompts [n, prompt]`` greedily by `new_tokens`, past any end-of-text token."""
    batches = prompts.split(_ROWS)
    description = "generating, dense" if decoder.profile is None else "generating, skipping"
    decoder.reset_stats()
    rows = []
    for batch in track(batches, description, len(batches)):
        steps = list(decoder.decode(batch, max_new_tokens=new_tokens))
        rows.append(torch.stack(steps, dim=1).cpu())
    return Continuation(torch.cat(rows), None if decoder.profile is None else decoder.stats)
