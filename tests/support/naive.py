"""Both rules written out, one token and one layer at a time: what the runtime must agree with."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ffnskip.profiles.schema import Skip
from ffnskip.profiles.weights import Weights


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

    def skips(self, layer: int, score: float = math.inf) -> bool:
        """By Algorithm 1, or for the rule `predicted-damage` by the layer's score."""
        in_region = self.skip.cold_s <= layer < self.skip.cold_e
        if self.skip.rule == "predicted-damage":
            decision = not self.dense and self.skip.threshold > 0 and score < math.log(self.skip.threshold)
        else:
            window = math.inf if self.skip.window is None else self.skip.window
            decision = self.trigger is not None and layer <= self.trigger + window
        self.skipped.append(in_region and decision)
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
def naive_forward(
    model: PreTrainedModel, text: Tensor, skip: Skip, prompt: int = 0, weights: Weights | None = None
) -> NaiveRun:
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
            x = layer.post_attention_layernorm(h)
            tensors = tensors_of_layer(skip, weights, index)
            if token.skips(index, naive_score(tensors, x[0, 0])):
                stream = h + naive_g(tensors, layer.mlp, x[0, 0])
            else:
                stream = h + layer.mlp(x)
                token.ran(index, float((h * stream).sum() / (h.norm() * stream.norm())))
        tokens.append(token)
        logits.append(model.lm_head(body.norm(stream))[0, 0])
    return NaiveRun(tokens, torch.stack(logits), cache)


def tensors_of_layer(skip: Skip, weights: Weights | None, layer: int) -> dict[str, Tensor]:
    """The weights of one layer in float64; none outside the skip region."""
    tensors = weights.tensors if weights and skip.cold_s <= layer < skip.cold_e else {}
    return {name: tensor[layer - skip.cold_s].double() for name, tensor in tensors.items()}


def naive_score(tensors: dict[str, Tensor], x: Tensor) -> float:
    """What the layer's probe says of one token, ``x [hidden]``."""
    return float(x.double() @ tensors["probe.weight"] + tensors["probe.bias"]) if "probe.bias" in tensors else math.inf


def naive_g(tensors: dict[str, Tensor], ffn: nn.Module, x: Tensor) -> Tensor:
    """What is added for one token, ``x [hidden]``, one term at a time in float64."""
    x = x.double()
    g = tensors.get("bias", torch.zeros_like(x))
    if "linear" in tensors:
        g = g + tensors["linear"] @ x
    if "low_rank.first" in tensors:
        g = g + tensors["low_rank.second"] @ (tensors["low_rank.first"] @ x)
    for column, neuron in enumerate(tensors.get("neurons.index", torch.empty(0)).long().tolist()):
        gate, up = (ffn.get_parameter(f"{name}.weight")[neuron].double() for name in ("gate_proj", "up_proj"))
        g = g + tensors["neurons.down"][:, column] * nn.functional.silu(gate @ x) * (up @ x)
    return g


def naive_quality(model: PreTrainedModel, sequence: Tensor, skip: Skip) -> tuple[dict[str, float], NaiveRun]:
    """The means over one sequence's predictions past warm-up, token by token, in natural logarithms."""
    with torch.inference_mode():
        dense = model(sequence[None]).logits[0]
    naive = naive_forward(model, sequence, skip)
    sums = dict.fromkeys(("nll_dense", "nll", "kl", "top1_agreement"), 0.0)
    positions = range(skip.warm_up, len(sequence) - 1)
    for position in positions:
        p, q = dense[position].softmax(0).tolist(), naive.logits[position].softmax(0).tolist()
        following = int(sequence[position + 1])
        sums["nll_dense"] -= math.log(p[following])
        sums["nll"] -= math.log(q[following])
        sums["kl"] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        sums["top1_agreement"] += p.index(max(p)) == q.index(max(q))
    figures = {name: total / len(positions) for name, total in sums.items()}
    return figures | {"skip_ratio": float(naive.skipped[skip.warm_up :].double().mean())}, naive
