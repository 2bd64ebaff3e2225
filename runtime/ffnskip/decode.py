"""The decode loop: prefill the prompt, then one forward pass per token.

A language model is run in two phases. *Prefill* pushes the whole prompt through the model at once and fills the KV
cache. *Decoding* then feeds one token per sequence and reads the next from the logits, over and over; at batch 1 its
speed is bound by the bytes of weights that each step reads, which is what skipping FFNs saves.

The loop leaves both to a path: `GeneralPath` runs any Hugging Face decoder through its own forward pass; others are
faster for some models (`ffnskip.Decoder` chooses).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.model.forward import Product, forward, multiplied_by
from ffnskip.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DecodePath(Protocol):
    """One way to run a model over the sequences of one decode."""

    def prefill(self, prompts: Tensor, mask: Tensor | None) -> Tensor:
        """Run the prompts through the model.

        Args:
            prompts: ``[batch, prompt]``, padded on the left.
            mask: ``[batch, prompt]``, 0 on padding; None where there is none.

        Returns:
            Logits of the next token, ``[batch, vocabulary]``.
        """
        ...

    def step(self, tokens: Tensor, ended: Tensor) -> Tensor:
        """Take every sequence one token further.

        Args:
            tokens: ``[batch]``, the latest ones.
            ended: ``[batch]`` bool on the CPU, the sequences whose tokens no longer matter.

        Returns:
            Logits of the next token, ``[batch, vocabulary]``.
        """
        ...


class GeneralPath:
    """Any Hugging Face decoder, through its own forward pass, with or without a profile applied.

    Args:
        model: the model.
        product: multiplies its matrices, see `multiplied_by`.
    """

    def __init__(self, model: PreTrainedModel, product: Product | None = None) -> None:
        self._model = model
        self._product = product
        self._cache: object = None  # some models make one of their own kind
        self._mask: Tensor | None = None
        self._position = torch.empty(0)

    def prefill(self, prompts: Tensor, mask: Tensor | None) -> Tensor:
        """See `DecodePath`."""
        if mask is None and len(prompts) > 1:
            mask = torch.ones_like(prompts)  # rows that end before others are masked from then on, and not counted
        self._mask = mask
        counting = torch.ones_like(prompts) if mask is None else mask
        self._position = (counting.cumsum(-1) - 1).clamp(min=0)
        return self._forward(prompts)

    def step(self, tokens: Tensor, ended: Tensor) -> Tensor:
        """See `DecodePath`."""
        if self._mask is not None:
            self._mask = torch.cat([self._mask, (~ended)[:, None].to(self._mask)], dim=1)
        self._position = self._position[:, -1:] + 1
        return self._forward(tokens[:, None])

    def _forward(self, tokens: Tensor) -> Tensor:
        with multiplied_by(self._product):
            output = forward(
                self._model,
                tokens,
                attention_mask=self._mask,
                position_ids=self._position,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = getattr(output, "past_key_values", None)
        if self._cache is None:  # feeding it one token a time would give another text
            raise UnsupportedModelError(
                f"Models of type {self._model.config.model_type!r} keep no key-value cache to decode with: use "
                "model.generate."
            )
        logits: Tensor = output.logits
        return logits[:, -1]


@torch.inference_mode()
def generate_tokens(
    path: DecodePath,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    sampling: Sampling = GREEDY,
    stop_tokens: Collection[int] = (),
    forced: Tensor | None = None,
) -> Iterator[Tensor]:
    """Continue each prompt of a batch along a path; arguments and what is yielded are those of `Decoder.decode`."""
    choose = sampling.chooser(input_ids.device)
    stop = torch.tensor(sorted(stop_tokens), dtype=torch.long)
    ended = torch.zeros(len(input_ids), dtype=torch.bool)
    tokens = input_ids[:, -1]
    for index in range(max_new_tokens):
        logits = path.step(tokens, ended) if index else path.prefill(input_ids, attention_mask)
        if index == 0 and bool(logits.isnan().any()):
            raise FfnskipError("The model's predictions are not finite numbers: try another dtype, such as float32.")
        following = choose(logits)
        if forced is not None:  # after the choice, so that a step takes as long as one that keeps it
            following = forced[:, index]
        # Without stop tokens nothing is asked of the device here, so that it need not wait for the host.
        tokens = torch.where(ended.to(tokens.device), tokens, following) if stop_tokens else following
        yield tokens
        if stop_tokens:
            ended = torch.isin(tokens.cpu(), stop)
            if bool(ended.all()):
                return
