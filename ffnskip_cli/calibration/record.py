"""Step 2: record the similarity of every layer for every token of the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.decode import decode
from ffnskip.layers import decoder, watch
from ffnskip.rules import similarity
from ffnskip_cli.track import Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GENERATE_ROWS = 16  # sequences that are generated side by side


@dataclass(frozen=True)
class Record:
    """What the dense model did.

    Attributes:
        sequences: the tokens, ``[sequences, length]``.
        similarities: ``[sequences, recorded, n_layers]`` float32, of the last ``recorded`` tokens of each sequence.
    """

    sequences: Tensor
    similarities: Tensor

    @property
    def prompt_tokens(self) -> int:
        """Tokens at the start of each sequence that were not recorded because they were the prompt."""
        return self.sequences.shape[1] - self.similarities.shape[1]

    def past(self, warm_up: int) -> Tensor:
        """The similarities past the first `warm_up` recorded tokens, ``[tokens, n_layers]``."""
        return self.similarities[:, warm_up:].flatten(0, 1)


@torch.inference_mode()
def record_text(model: PreTrainedModel, sequences: Tensor, track: Track) -> Record:
    """One teacher-forced pass over ``sequences [n, length]``; every token counts as generated. The fast way."""
    body, seen = decoder(model), _Seen()
    rows = []
    with watch(model, seen):
        for sequence in track(sequences, "recording similarities", len(sequences)):
            body(sequence[None].to(model.device), use_cache=False)
            rows.append(seen.take())
    return Record(sequences, torch.cat(rows))


@torch.inference_mode()
def record_generated(model: PreTrainedModel, prompts: Tensor, new_tokens: int, track: Track) -> Record:
    """Let the model continue ``prompts [n, prompt]`` greedily by `new_tokens`, as the paper did, and record those.

    The last generated token is never fed back, so ``new_tokens + 1`` are generated and the last is dropped.
    """
    seen = _Seen()
    sequences, rows = [], []
    batches = prompts.split(_GENERATE_ROWS)
    for batch in track(batches, "generating and recording similarities", len(batches)):
        tokens, similarities = [batch.to(model.device)], []
        with watch(model, seen):
            for step, following in enumerate(decode(model, tokens[0], max_new_tokens=new_tokens + 1)):
                similarity_of_input = seen.take()
                if step > 0:  # step 0 ran the prompt
                    similarities.append(similarity_of_input)
                if step < new_tokens:
                    tokens.append(following[:, None])
        sequences.append(torch.cat(tokens, dim=1).cpu())
        rows.append(torch.cat(similarities, dim=1))
    return Record(torch.cat(sequences), torch.cat(rows))


class _Seen:
    """Collects one forward pass's similarities."""

    def __init__(self) -> None:
        self._layers: dict[int, Tensor] = {}

    def __call__(self, layer: int, h: Tensor, f: Tensor) -> None:
        self._layers[layer] = similarity(h, f).cpu()

    def take(self) -> Tensor:
        """``[batch, sequence, n_layers]`` of the pass that has just ended."""
        stacked = torch.stack([self._layers[layer] for layer in sorted(self._layers)], dim=-1)
        self._layers.clear()
        return stacked
