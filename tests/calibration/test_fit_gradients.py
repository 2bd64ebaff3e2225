"""Fisher matrices and sensitivities: what they are, and that they predict what a small change costs."""

from functools import cache

import pytest
import torch
from support.pico import HIDDEN, N_LAYERS, pico_model, pico_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffnskip.model.sites import ffn_sites
from ffnskip_cli.calibration.fit.gradients import Gradients, take_gradients
from ffnskip_cli.calibration.fit.least_squares import with_one
from ffnskip_cli.calibration.lab import Lab

TEXT, FIRST, SEED = pico_tokens(20, batch=6), 4, 5


@cache
def llama() -> PreTrainedModel:
    return pico_model()


@cache
def taken() -> Gradients:
    return take_gradients(Lab(llama()), TEXT, FIRST, SEED)


def streams(model: PreTrainedModel, tokens: Tensor, moved: int = -1, by: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits ``[length, vocabulary]``, and what leaves each layer, ``[layers, length, hidden]``, written out."""
    left = []

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        left.append(output + by if len(left) == moved and by is not None else output)
        return left[-1]

    hooks = [layer.register_forward_hook(look) for layer in model.model.layers]
    logits = model(tokens[None], use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, torch.cat(left)


def drawn_labels(model: PreTrainedModel) -> list[Tensor]:
    """The labels that this seed draws from the model's own predictions, one sequence after the other."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(SEED)
        return [torch.multinomial(model(tokens[None]).logits[0].softmax(-1), 1)[:, 0] for tokens in TEXT]


@cache
def gradients_one_by_one(layer: int) -> Tensor:
    """``[sequences, length, hidden]``: of the log-likelihood of all labels by one token's stream behind the layer.

    Each token is moved alone, by a variable of its own.
    """
    rows = []
    for tokens, labels in zip(TEXT, drawn_labels(llama()), strict=True):
        by = torch.zeros(1, len(tokens), HIDDEN, requires_grad=True)
        logits, _ = streams(llama(), tokens, layer, by)
        likelihood = torch.stack([logits[at].log_softmax(-1)[label] for at, label in enumerate(labels)]).sum()
        (gradient,) = torch.autograd.grad(likelihood, by)
        rows.append(gradient[0])
    return torch.stack(rows)


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_the_fisher_matrix_is_the_mean_of_the_tokens_gradients_by_themselves(layer: int) -> None:
    gradients = gradients_one_by_one(layer)[:, FIRST:].flatten(0, 1)
    expected = torch.stack([torch.outer(gradient, gradient) for gradient in gradients]).mean(dim=0)
    assert torch.allclose(taken().fisher[layer], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_the_sensitivity_is_a_centred_probe_of_the_log_of_the_squared_gradient() -> None:
    for layer in (1, 4):
        x = torch.cat([ffn_inputs(layer, tokens)[FIRST:] for tokens in TEXT])
        predicted = with_one(x) @ taken().sensitivity[layer]
        assert float(predicted.mean()) == pytest.approx(0.0, abs=1e-3)
        logarithms = gradients_one_by_one(layer)[:, FIRST:].square().sum(dim=-1).log().flatten()
        correlation = torch.corrcoef(torch.stack([predicted, logarithms]))[0, 1]
        assert correlation > 0.4  # on what it was fitted to


def ffn_inputs(layer: int, tokens: Tensor) -> Tensor:
    seen = []
    mlp = ffn_sites(llama())[layer].ffn
    hook = mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.no_grad():
        llama()(tokens[None])
    hook.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 4])
def test_half_e_f_e_predicts_what_a_small_change_of_one_tokens_stream_costs(layer: int) -> None:
    """To second order, on average: many texts, tokens and directions are drawn, each change for itself."""
    text = pico_tokens(20, batch=64, seed=7)
    fisher = take_gradients(Lab(llama()), text, 0, SEED).fisher[layer]
    generator = torch.Generator().manual_seed(1)
    predicted = cost = 0.0
    for tokens in text:
        dense, _ = streams(llama(), tokens)
        for at in torch.randint(len(tokens), (4,), generator=generator).tolist():
            change = torch.zeros(1, len(tokens), HIDDEN)
            change[0, at] = 0.03 * torch.randn(HIDDEN, generator=generator)
            moved, _ = streams(llama(), tokens, layer, change)
            predicted += 0.5 * float(change[0, at] @ fisher @ change[0, at])
            log_dense, log_moved = dense.double().log_softmax(-1), moved.double().log_softmax(-1)
            cost += float((log_dense.exp() * (log_dense - log_moved)).sum())
    assert predicted == pytest.approx(cost, rel=0.2)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_random_state_and_the_model_alone() -> None:
    state = torch.random.get_rng_state()
    again = take_gradients(Lab(llama()), TEXT, FIRST, SEED)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(again.fisher, taken().fisher)
    assert torch.equal(again.sensitivity, taken().sensitivity)
    other = take_gradients(Lab(llama()), TEXT, FIRST, SEED + 1)
    assert not torch.equal(other.fisher, taken().fisher)
    assert all(parameter.grad is None for parameter in llama().parameters())


@pytest.mark.parametrize("name", ["gemma2", "granite", "phi", "falcon-two-norms", "gpt2", "mixtral"])
def test_every_architecture_has_gradients_in_every_layer(name: str) -> None:
    gradients = take_gradients(Lab(pico_model(name)), TEXT[:1], FIRST, SEED)
    assert bool(gradients.fisher.isfinite().all())
    assert bool((gradients.fisher.diagonal(dim1=1, dim2=2) > 0).all())
    assert gradients.sensitivity.shape == (N_LAYERS, HIDDEN + 1)
