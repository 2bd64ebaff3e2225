"""What a model's `forward` was asked, and whether a fused step computes that."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNDERSTOOD = ("input_ids", "past_key_values", "attention_mask", "position_ids", "cache_position", "logits_to_keep")
_TELLING = (Tensor, bool, int, float, str, list, tuple, dict)  # `generate` passes on a tokenizer that it was given


def given_by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a pass by name."""
    given: dict[str, Any] = dict(signature.bind_partial(*args, **kwargs).arguments) if args else dict(kwargs)
    given.update(given.pop("kwargs", {}))
    return given


def over_one_token(given: dict[str, Any]) -> bool:
    """Whether a pass takes each sequence that is in a cache one token further."""
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    return tokens is not None and tokens.shape[1] == 1 and given.get("past_key_values") is not None


def over_prompts(given: dict[str, Any]) -> bool:
    """Whether a pass begins the sequences of an empty cache, and asks only for what follows their last tokens."""
    tokens, cache, kept = given.get("input_ids"), given.get("past_key_values"), given.get("logits_to_keep", 0)
    if tokens is None or not isinstance(cache, DynamicCache) or isinstance(kept, Tensor):
        return False
    return cache.get_seq_length() == 0 and 1 in (kept, tokens.shape[1])


def why_not_fused(given: dict[str, Any], model: PreTrainedModel) -> str | None:
    """Why a pass asks for more than a step computes, in one sentence; None if it does not."""
    if given.get("input_ids") is None:
        return "The pass is given embeddings in the place of tokens."
    if torch.is_grad_enabled():
        return "The pass records gradients: run the model under torch.no_grad()."
    if model.training:
        return "The model is in training mode."
    if given.get("use_cache") is False or given.get("return_dict") is False:
        return "The pass is to keep no cache, or to return a tuple, which a fused decode step does not."
    others = [name for name in given if name not in (*_UNDERSTOOD, "use_cache", "return_dict")]
    others = [name for name in others if given[name] is not False and isinstance(given[name], _TELLING)]
    others += ["logits_to_keep"] * isinstance(given.get("logits_to_keep"), Tensor)
    others += [name for name in ("output_attentions", "output_hidden_states") if getattr(model.config, name, False)]
    if others:
        return f"The pass is given {others[0]}, which a fused decode step does not know."
    if torch.is_autocast_enabled(given["input_ids"].device.type):
        return "A fused decode step does not run under autocast."
    return None


def padding(given: dict[str, Any], length: int, batch: int) -> Tensor | None:
    """How many padding tokens each sequence has in front, ``[batch]``; None if a pass sees or places
    tokens otherwise, or a sequence is nothing but padding.

    Args:
        given: the pass's arguments.
        length: of the cache, padding included, when the pass is over.
        batch: how many sequences there are.
    """
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    slots = torch.arange(length, device=given["input_ids"].device)
    starts = torch.zeros(batch, dtype=torch.int64, device=slots.device)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != (batch, length):
            return None
        starts = (mask == 0).sum(-1)
        if not torch.equal(mask != 0, slots >= starts[:, None]) or int(starts.max()) == length:
            return None
    if positions is None:
        return starts if not bool(starts.any()) else None
    of_pass = slots[length - given["input_ids"].shape[1] :]
    if positions.dim() != 2 or positions.shape[1] != len(of_pass):
        return None
    expected = of_pass - starts[:, None]
    return starts if bool(((positions == expected) | (expected < 0)).all()) else None
