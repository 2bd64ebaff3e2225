"""What happens on the model's own text: tokens that never skip, and loops.

A ratio is an average. `never_skip_fraction` is its dark side, the share of generated tokens that ran every FFN and so
cost more than without a profile (the paper's Table 6). And a damaged model often shows first by repeating itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ffnskip.decoder import Decoder
from ffnskip.stats import SkipStats
from ffnskip_cli.track import Track

_ROWS = 16  # prompts that are continued side by side
_NGRAM = 4


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
        """Share of 4-grams that occurred before in the same continuation, mean over continuations (seq-rep-4)."""
        return sum(repetition(row.tolist()) for row in self.tokens) / len(self.tokens)


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


def repetition(tokens: list[int]) -> float:
    """1 - distinct 4-grams / 4-grams (seq-rep-4, Welleck et al. 2020); 0 for fewer than four tokens."""
    ngrams = [tuple(tokens[i : i + _NGRAM]) for i in range(len(tokens) - _NGRAM + 1)]
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
