"""The decode loop: prefill the prompt, then one forward pass per token.

A language model is run in two phases. *Prefill* pushes the whole prompt through the model at once and fills the KV
cache. *Decoding* then feeds one token per sequence and reads the next from the logits, over and over; at batch 1 its
speed is bound by the bytes of weights that each step reads, which is what skipping FFNs saves.

The loop knows nothing about profiles: put one on the model with `ffnskip.apply` and the same loop skips.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.errors import FfnskipError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIN_TEMPERATURE = 1e-4  # logits divided by less would overflow


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else sampled from the `top_p` nucleus with `seed`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature == 0.0 or MIN_TEMPERATURE <= self.temperature < float("inf")):
            raise FfnskipError(
                f"The temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, not {self.temperature}."
            )
        if not 0.0 < self.top_p <= 1.0:
            raise FfnskipError(f"top_p must be more than 0 and at most 1, not {self.top_p}.")


GREEDY = Sampling()


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    sampling: Sampling = GREEDY,
    stop_tokens: Collection[int] = (),
) -> Iterator[Tensor]:
    """Continue each prompt of a batch.

    Args:
        model: a Hugging Face decoder, with or without a profile applied.
        input_ids: the prompts, ``[batch, prompt]``, padded on the left.
        max_new_tokens: how many tokens to yield at most.
        attention_mask: ``[batch, prompt]``, 0 on padding; None where there is none.
        sampling: greedy or sampled.
        stop_tokens: a row ends with the first of these; the loop ends when every row has.

    Yields:
        The next token of every row, ``[batch]``. Rows that have ended repeat their stop token.
    """
    from transformers import DynamicCache

    choose = _chooser(sampling, input_ids.device)
    stop = torch.tensor(sorted(stop_tokens), dtype=torch.long, device=input_ids.device)
    cache = DynamicCache(config=model.config)
    tokens, mask = input_ids, attention_mask
    if mask is None and len(input_ids) > 1:
        mask = torch.ones_like(input_ids)  # rows that end before others are masked from then on, and not counted
    counting = torch.ones_like(input_ids) if mask is None else mask
    position = (counting.cumsum(-1) - 1).clamp(min=0)
    ended: Tensor | None = None
    for _ in range(max_new_tokens):
        logits = model(
            tokens,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        following = choose(logits)
        if ended is not None:
            following = torch.where(ended, tokens[:, -1], following)
        yield following
        ended = torch.isin(following, stop)
        if bool(ended.all()):
            return
        tokens = following[:, None]
        if mask is not None:
            mask = torch.cat([mask, (~ended)[:, None].to(mask)], dim=1)
        position = position[:, -1:] + 1


def _chooser(sampling: Sampling, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Maps logits ``[batch, vocabulary]`` to tokens ``[batch]``."""
    from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    if sampling.temperature == 0.0:
        return lambda logits: logits.argmax(dim=-1)
    warp = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_p < 1.0:
        warp.append(TopPLogitsWarper(sampling.top_p))
    generator = torch.Generator(device).manual_seed(sampling.seed)

    def sample(logits: Tensor) -> Tensor:
        probabilities = warp(None, logits.float()).softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    return sample
