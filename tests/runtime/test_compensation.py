"""What is added for a skipped FFN, against the formulas."""

import pytest
import torch
from support.factories import each_combination, full, make_compensated, tensors_of
from support.naive import naive_g, tensors_of_layer
from support.pico import pico_model, pico_profile
from torch import Tensor, nn

import ffnskip
from ffnskip.compensation.compensator import Compensator
from ffnskip.compensation.kinds import BIAS, FIRST, SECOND
from ffnskip.errors import ProfileError
from ffnskip.profiles.profile import Profile, dump_profile, parse_profile
from ffnskip.profiles.weights import Weights
from ffnskip.rules.predicted_damage import PROBE, PROBE_BIAS


def by_hand(profile: Profile, index: int, ffn: nn.Module, x: Tensor) -> Tensor:
    """``g(x)`` in float64, in layer `index` of the skip region."""
    tensors = tensors_of_layer(profile.skip, profile.weights, profile.skip.cold_s + index)
    return torch.stack([naive_g(tensors, ffn, row) for row in x])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@each_combination
def test_g_and_the_score_are_the_formulas(profile: Profile, dtype: torch.dtype) -> None:
    ffn = pico_model(dtype=dtype).model.layers[3].mlp
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    compensator = Compensator(profile, 2, ffn)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
    added, expected = compensator.added(x), by_hand(profile, 2, ffn, x)
    assert (added.shape, added.dtype) == (x.shape, dtype)
    assert torch.allclose(added.double(), expected, atol=tolerance, rtol=0)
    score = compensator.probe(x)
    assert (score is None) == (profile.skip.rule == "cosine")
    if score is not None:
        tensors = tensors_of(profile)
        exact = x.double() @ tensors[PROBE][2].double() + tensors[PROBE_BIAS][2].double()
        assert score.dtype == torch.float32
        assert torch.allclose(score.double(), exact, atol=max(tolerance, 1e-6), rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", [BIAS, PROBE, PROBE_BIAS, FIRST, SECOND, "neurons.down"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_may_be_stored_in_its_own_precision(name: str, model_dtype: torch.dtype) -> None:
    tensors = tensors_of(full())
    mixed = tensors | {name: tensors[name].to(torch.bfloat16)}
    profile = full().with_weights(Weights(mixed))
    ffn, x = pico_model(dtype=model_dtype).model.layers[1].mlp, torch.ones(2, 32, dtype=model_dtype)
    compensator = Compensator(profile, 0, ffn)
    score = compensator.probe(x)
    assert score is not None
    assert score.dtype == torch.float32
    assert torch.allclose(compensator.added(x).double(), by_hand(profile, 0, ffn, x), atol=0.06, rtol=0)


def test_weights_follow_a_model_that_is_moved_to_another_precision() -> None:
    model = pico_model(dtype=torch.bfloat16)
    profile = make_compensated("linear", neurons=4)
    compensator = Compensator(profile, 0, model.model.layers[1].mlp)
    model.float()
    x = torch.randn(3, 32)
    with torch.no_grad():
        assert compensator.added(x).dtype == torch.float32
        assert compensator.added(x.bfloat16()).dtype == torch.bfloat16
        assert torch.allclose(compensator.added(x), compensator.added(x.bfloat16()).float(), atol=0.06, rtol=0)


def test_a_profile_without_its_weights_cannot_be_applied() -> None:
    model = pico_model()
    parsed = parse_profile(dump_profile(make_compensated("mean", **pico_profile(model).model.model_dump())))
    for check in (True, False):
        with pytest.raises(ProfileError, match="The profile came without its weights"):
            ffnskip.apply(model, parsed, check=check)
    assert type(model.model.layers[2].mlp).__name__ == "LlamaMLP"
