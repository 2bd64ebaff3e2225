"""How much the model's predictions depend on what each FFN gives: Fisher matrices and sensitivities.

A small change ``e`` of what an FFN gives for one token moves all predictions that depend on it; summed over them the
KL divergence is ``½ eᵀ F e`` to second order, with the Fisher matrix ``F = E[∇∇ᵀ]``, where ``∇`` is the gradient of the
log-likelihood of labels sampled from the model itself. One backward pass gives it for all layers.

``F`` is a mean over tokens, and tokens differ by an order of magnitude and more. `sensitivity` predicts from the FFN's
input by how much, as far as a linear probe can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ffnskip.model.forward import forward
from ffnskip.model.sites import FFNSite, ffn_sites, first_output, input_device
from ffnskip_cli.calibration.fit.least_squares import NormalEquations, with_one
from ffnskip_cli.calibration.lab import Lab

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RIDGE = 1e-2  # there are few tokens with gradients, and their logarithms are noisy
_TINY = 1e-20


@dataclass(frozen=True)
class Gradients:
    """What the backward passes gave.

    Attributes:
        fisher: ``[layers, hidden, hidden]`` float32, in nats per squared unit of the FFN's output.
        sensitivity: ``[layers, hidden + 1]``, a probe on ``[x, 1]`` for the logarithm of a token's squared gradient
            over that of the geometric mean of all tokens.
    """

    fisher: Tensor
    sensitivity: Tensor


def take_gradients(lab: Lab, sequences: Tensor, first: int, seed: int) -> Gradients:
    """Run forward and backward over ``sequences [n, length]``, using the positions from `first` on."""
    model = lab.model
    sites = ffn_sites(model)
    hidden = lab.model.config.get_text_config().hidden_size
    fisher = torch.zeros(len(sites), hidden, hidden, dtype=torch.float64)
    logarithms = NormalEquations(len(sites), hidden + 1, 1)
    tokens = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for sequence in lab.track(sequences, "taking gradients", len(sequences)):
            for layer, (x, gradient) in enumerate(_backward(model, sites, sequence)):
                x, gradient = x[first:].float(), gradient[first:].float()
                fisher[layer] += (gradient.T @ gradient).double().cpu()
                size = gradient.square().sum(dim=1, keepdim=True).clamp(min=_TINY)
                logarithms.add(layer, with_one(x), size.log())
            tokens += len(sequence) - first
    return Gradients((fisher / tokens).float(), _centred(logarithms).float())


def sampled_log_likelihood(model: PreTrainedModel, sequence: Tensor) -> Tensor:
    """Log-likelihood, summed over ``sequence [length]``, of next tokens that are sampled from the model itself."""
    embedded = model.get_input_embeddings()(sequence[None].long().to(input_device(model)))
    logits = forward(model, inputs_embeds=embedded.detach().requires_grad_(True), use_cache=False).logits[0].float()
    log_likelihoods = logits.log_softmax(dim=-1)
    labels = torch.multinomial(log_likelihoods.detach().exp().cpu(), 1).to(logits.device)
    total: Tensor = log_likelihoods.gather(1, labels).sum()
    return total


def _centred(logarithms: NormalEquations) -> Tensor:
    """The probe, less what it says of the average token."""
    probe = logarithms.solve(_RIDGE)[..., 0]
    probe[:, -1] -= logarithms.cross[:, -1, 0] / logarithms.count
    return probe


def _backward(model: PreTrainedModel, sites: list[FFNSite], sequence: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per layer, the FFN's input and the gradient of its output ``f``, both ``[length, hidden]``."""
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def enter(layer: int) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[layer] = args[0].detach()

        return hook

    def leave(layer: int) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            outputs[layer] = first_output(output)

        return hook

    hooks = []
    for layer, site in enumerate(sites):
        sink = site.ffn if site.join == "sum" else site.modules[-1]  # all addends have the gradient of their sum
        hooks.append(site.ffn.register_forward_pre_hook(enter(layer)))  # type: ignore[arg-type]
        hooks.append(sink.register_forward_hook(leave(layer)))  # type: ignore[arg-type]
    try:
        with torch.enable_grad():
            log_likelihood = sampled_log_likelihood(model, sequence)
            gradients = torch.autograd.grad(log_likelihood, [outputs[layer] for layer in range(len(sites))])
    finally:
        for hook in hooks:
            hook.remove()
    return [(inputs[layer].flatten(0, -2), g.flatten(0, -2)) for layer, g in enumerate(gradients)]
