"""What callers hand to a decode, checked before anything runs."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import Tensor

from ffnskip.errors import FfnskipError
from ffnskip.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_decode(
    model: PreTrainedModel,
    prompts: Tensor,
    max_new_tokens: int,
    mask: Tensor | None,
    sampling: Sampling,
    stop_tokens: Collection[int],
    forced: Tensor | None,
) -> None:
    """Raise FfnskipError, with one sentence, unless these are what `Decoder.decode` takes."""
    if not isinstance(prompts, Tensor) or prompts.dim() != 2 or not prompts.numel() or prompts.is_floating_point():
        raise FfnskipError("The prompts must be a tensor of token ids [batch, prompt] with one token or more.")
    if not isinstance(max_new_tokens, int):
        raise FfnskipError(f"max_new_tokens must be a whole number, not {max_new_tokens!r}.")
    if not isinstance(sampling, Sampling):
        raise FfnskipError(f"sampling must be an ffnskip.Sampling, not {sampling!r}.")
    if not isinstance(stop_tokens, Collection) or not all(isinstance(token, int) for token in stop_tokens):
        raise FfnskipError(f"stop_tokens must be a collection of token ids, not {stop_tokens!r}.")
    _check_padding(model, prompts, mask)
    if forced is not None and (len(forced) != len(prompts) or forced.shape[1] < max_new_tokens):
        raise FfnskipError(
            f"Forced tokens of shape {list(forced.shape)} do not fit {len(prompts)} prompts and "
            f"{max_new_tokens} new tokens."
        )


def _check_padding(model: PreTrainedModel, prompts: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        padding, first = _padding_token(model), prompts[:, 0]
        if padding is not None and len(prompts) > 1 and bool((first == padding).any() & (first != padding).any()):
            raise FfnskipError("Prompts that begin with padding need their attention_mask.")
        return
    if not isinstance(mask, Tensor) or mask.shape != prompts.shape:
        raise FfnskipError(f"The attention_mask must be a tensor of the prompts' shape, {list(prompts.shape)}.")
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise FfnskipError(
            "The prompts are padded on the right, where new tokens go: pad them on the left "
            "(tokenizer.padding_side = 'left')."
        )
    if bool((mask[:, -1] == 0).any()):
        raise FfnskipError("A prompt is nothing but padding.")


def _padding_token(model: PreTrainedModel) -> int | None:
    """The token that pads, where it can be told from one that begins a text."""
    config = model.config.get_text_config()
    padding = getattr(config, "pad_token_id", None)
    return padding if isinstance(padding, int) and padding != getattr(config, "bos_token_id", None) else None
