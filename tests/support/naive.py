"""Algorithm 1 written out, one token and one layer at a time: what the runtime must agree with."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ffnskip.profiles.schema import Skip


class NaiveToken:
    """One token on its way through the layers. `index` counts the generated tokens before it; prompts are negative."""

    def __init__(self, skip: Skip, index: int) -> None:
        since_warm_up = index - skip.warm_up + 1
        refreshed = skip.refresh_every is not None and since_warm_up % skip.refresh_every == 0
        self.past_warm_up = since_warm_up > 0
        self.dense = not self.past_warm_up or refreshed
        self.skip = skip
        self.trigger: int | None = None
        self.skipped: list[bool] = []
        self.compared: list[int] = []

    def skips(self, layer: int) -> bool:
        window = math.inf if self.skip.window is None else self.skip.window
        in_region = self.skip.cold_s <= layer < self.skip.cold_e
        self.skipped.append(in_region and self.trigger is not None and layer <= self.trigger + window)
        return self.skipped[-1]

    def ran(self, layer: int, similarity: float) -> None:
        in_region = self.skip.cold_s <= layer < self.skip.cold_e
        if in_region and not self.dense:
            self.compared.append(layer)
            self.trigger = layer if similarity >= self.skip.threshold else None


@dataclass
class NaiveRun:
    """What a naive forward pass gave: ``logits [tokens, vocabulary]``, ``skipped [tokens, n_layers]``, and the rest."""

    tokens: list[NaiveToken]
    logits: Tensor
    cache: DynamicCache

    @property
    def skipped(self) -> Tensor:
        return torch.tensor([token.skipped for token in self.tokens])


@torch.inference_mode()
def naive_forward(model: PreTrainedModel, text: Tensor, skip: Skip, prompt: int = 0) -> NaiveRun:
    """Push the tokens ``[length]`` one by one through an unwrapped Llama model; the first `prompt` tokens run dense."""
    body, cache = model.model, DynamicCache(config=model.config)
    tokens, logits = [], []
    for position in range(len(text)):
        token = NaiveToken(skip, position - prompt)
        stream = body.embed_tokens(text[None, position : position + 1])
        rotation = body.rotary_emb(stream, torch.tensor([[position]]))
        for index, layer in enumerate(body.layers):
            attended, _ = layer.self_attn(
                layer.input_layernorm(stream), position_embeddings=rotation, attention_mask=None, past_key_values=cache
            )
            h = stream + attended
            if token.skips(index):
                stream = h
            else:
                stream = h + layer.mlp(layer.post_attention_layernorm(h))
                token.ran(index, float((h * stream).sum() / (h.norm() * stream.norm())))
        tokens.append(token)
        logits.append(model.lm_head(body.norm(stream))[0, 0])
    return NaiveRun(tokens, torch.stack(logits), cache)
