"""Record the similarity of every layer for every token of the dense model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.decode import GeneralPath, generate_tokens
from ffnskip.model.sites import decoder_body, input_device, watch
from ffnskip.rules.cosine import similarity
from ffnskip_cli.calibration.settings import GENERATED_TOKENS, PROMPT_TOKENS, On

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Sequences that are recorded together. What is generated depends in its last bits on what is generated beside it, so
# these groups are the same on every machine and never split.
BLOCK: dict[On, int] = {"text": 1, "generated": 16}

_CHUNK = 64  # sequences that are looked at together, so that looking at a long recording makes no copy of it
_SAMPLE = 8  # sequences at least, as errors are taken over sequences


def sample_size(tokens: int, sequence_length: int) -> int:
    """How many sequences a sample of about `tokens` tokens has."""
    return max(_SAMPLE, tokens // sequence_length)


@dataclass(frozen=True)
class Record:
    """What a rule decides by, on some text.

    Attributes:
        sequences: the tokens, ``[sequences, length]``.
        values: ``[sequences, recorded, n_layers]`` float32, of the last ``recorded`` tokens of each sequence: the
            similarities of the dense model, or what the probes of `predicted-damage` say, in log nats.
    """

    sequences: Tensor
    values: Tensor

    @property
    def prompt_tokens(self) -> int:
        """Tokens at the start of each sequence that were not recorded because they were the prompt."""
        return self.sequences.shape[1] - self.values.shape[1]

    def first(self, tokens: int) -> Record:
        """The part with about the first `tokens` tokens: of a permuted text, a sample of the whole."""
        size = sample_size(tokens, self.sequences.shape[1])
        return Record(self.sequences[:size], self.values[:size])

    def chunks(self, warm_up: int) -> Iterator[Tensor]:
        """The values past the first `warm_up` recorded tokens, some ``[sequences, tokens, n_layers]`` a time."""
        return iter(self.values[:, warm_up:].split(_CHUNK))

    def layers(self, warm_up: int) -> Iterator[Tensor]:
        """The same layer by layer, ``[tokens]`` each."""
        return (layer.flatten() for layer in self.values[:, warm_up:].unbind(dim=-1))


def record_block(model: PreTrainedModel, sequences: Tensor, on: On) -> Record:
    """Record one block of ``sequences [n, length]``: on themselves, or on what the model writes from their starts."""
    if on == "text":
        return record_text(model, sequences)
    return record_generated(model, sequences[:, :PROMPT_TOKENS], GENERATED_TOKENS)


@torch.inference_mode()
def record_text(model: PreTrainedModel, sequences: Tensor) -> Record:
    """One teacher-forced pass for each of ``sequences [n, length]``; every token counts as generated. The fast way."""
    body, seen = decoder_body(model), _Seen()
    rows = []
    with watch(model, seen):
        for sequence in sequences:
            body(sequence[None].to(input_device(model)), use_cache=False)
            rows.append(seen.take())
    return Record(sequences, torch.cat(rows))


@torch.inference_mode()
def record_generated(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> Record:
    """Let the model continue ``prompts [n, prompt]`` greedily by `new_tokens`, as the paper did, and record those.

    The last generated token is never fed back, so ``new_tokens + 1`` are generated and the last is dropped.
    """
    seen = _Seen()
    tokens, similarities = [prompts.to(input_device(model))], []
    with watch(model, seen):
        for step, following in enumerate(generate_tokens(GeneralPath(model), tokens[0], max_new_tokens=new_tokens + 1)):
            similarity_of_input = seen.take()
            if step > 0:  # step 0 ran the prompt
                similarities.append(similarity_of_input)
            if step < new_tokens:
                tokens.append(following[:, None])
    return Record(torch.cat(tokens, dim=1).cpu(), torch.cat(similarities, dim=1))


class _Seen:
    """Collects one forward pass's similarities."""

    def __init__(self) -> None:
        self._layers: dict[int, Tensor] = {}

    def __call__(self, layer: int, h: Tensor, f: Tensor) -> None:
        self._layers[layer] = similarity(h, f).float().cpu()

    def take(self) -> Tensor:
        """``[batch, sequence, n_layers]`` of the pass that has just ended."""
        stacked = torch.stack([self._layers[layer] for layer in sorted(self._layers)], dim=-1)
        self._layers.clear()
        return stacked
