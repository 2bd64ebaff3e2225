"""Single neurons of an FFN: which models have them, and that a few give what the FFN's own forward computes."""

import pytest
import torch
from support.factories import make_compensated
from support.pico import SUPPORTED, pico_model, pico_profile
from torch import Tensor, nn
from transformers import PreTrainedModel

import ffnskip
from ffnskip.compensation.kinds import NEURONS
from ffnskip.errors import ProfileError
from ffnskip.model.neurons import Neurons, activations, count_neurons, down_projection
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.weights import Weights

WITHOUT = ["phi", "phi3", "glm4", "starcoder2", "gpt2", "mixtral", "falcon-one-norm", "falcon-two-norms"]
WITHOUT += ["gpt_neox-parallel", "gpt_neox-sequential"]
WITH = [name for name in SUPPORTED if name not in WITHOUT]
X = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))


def ffn_of(name: str = "llama", dtype: torch.dtype = torch.float32, **config: object) -> nn.Module:
    return ffn_sites(pico_model(name, dtype, **config))[1].ffn


@torch.no_grad()
@pytest.mark.parametrize("name", WITH)
def test_the_ffn_is_the_sum_of_its_neurons(name: str) -> None:
    ffn = ffn_of(name)
    assert count_neurons(ffn) == down_projection(ffn).shape[1] == 48
    assert torch.allclose(activations(ffn, X) @ down_projection(ffn).T, ffn(X), atol=1e-5)


@pytest.mark.parametrize("name", WITHOUT)
def test_other_ffns_have_none_and_a_profile_with_some_is_refused(name: str) -> None:
    model = pico_model(name)
    assert count_neurons(ffn_sites(model)[1].ffn) == 0
    before = list(model.modules())
    info = pico_profile(model).model.model_dump()
    with pytest.raises(ProfileError, match=r"^The profile's compensation uses neurons that the model's FFNs do not"):
        ffnskip.apply(model, make_compensated("linear", neurons=4, **info))
    assert_untouched(model, before)
    with ffnskip.apply(model, make_compensated("linear", **info), mode="score"):
        pass


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, {"mlp_bias": True}], ids=["plain", "bias"])
@pytest.mark.parametrize("index", [torch.tensor([47, 0, 5]), torch.tensor([7], dtype=torch.int32)])
def test_some_neurons_are_those_columns_of_all(index: Tensor, config: dict[str, object], dtype: torch.dtype) -> None:
    ffn, x = ffn_of("llama", dtype, **config), X.to(dtype)
    some = Neurons(ffn, index)(x)
    assert some.dtype == dtype
    assert torch.allclose(some, activations(ffn, x)[..., index.long()], atol=0.05 if dtype == torch.bfloat16 else 1e-6)


@torch.no_grad()
def test_neurons_move_to_another_precision_with_their_biases() -> None:
    ffn = ffn_of(mlp_bias=True)
    neurons = Neurons(ffn, torch.tensor([1, 2]))
    neurons.to(X.double())
    assert torch.allclose(neurons(X.double()).float(), activations(ffn, X)[..., 1:3], atol=1e-6)


def test_an_ffn_that_was_quantized_or_adapted_has_none() -> None:
    class OtherLinear(nn.Linear):
        pass

    ffn = ffn_of()
    ffn.up_proj = OtherLinear(32, 48)
    assert count_neurons(ffn) == 0


@pytest.mark.parametrize("neuron", [-1, 48])
@pytest.mark.parametrize("index", [0, 3])
@pytest.mark.parametrize("check", [True, False])
def test_a_neuron_that_does_not_exist_is_refused_and_the_model_stays_as_it_was(
    neuron: int, index: int, check: bool
) -> None:
    model = pico_model()
    before = list(model.modules())
    profile = make_compensated("linear", neurons=4, **pico_profile(model).model.model_dump())
    tensors = {name: tensor.clone() for name, tensor in profile.weights.tensors.items()}
    tensors[NEURONS][index, 2] = neuron
    with pytest.raises(ProfileError, match=r"the model.s FFNs do not have|holds negative numbers"):
        ffnskip.apply(model, profile.with_weights(Weights(tensors)), check=check)
    assert_untouched(model, before)


def assert_untouched(model: PreTrainedModel, before: list[nn.Module]) -> None:
    after = list(model.modules())
    assert len(after) == len(before)
    assert all(now is then for now, then in zip(after, before, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in after)
