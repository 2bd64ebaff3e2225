"""Small valid objects for tests."""

from typing import Any, Literal

import pytest
import torch

from ffnskip.compensation.kinds import NEURONS
from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Compensation, ModelInfo, Skip
from ffnskip.profiles.weights import Weights

Kind = Literal["none", "mean", "linear", "low-rank"]


# What a profile says of a text.
TEXT = {
    "dataset": "wikitext",
    "config": None,
    "split": "train",
    "revision": None,
    "text_sha256": "0123456789abcdef" * 4,
    "tokens_requested": 2048,
    "tokens_used": 2048,
    "sequence_length": 256,
}
CALIBRATION = {**TEXT, "seed": 0, "dtype": "bfloat16", "on": "text"}

# What a profile says of its cost.
MEASURED = {
    "target_ratio": 0.1,
    "skip_ratio": 0.1,
    "flops_saved": 0.0523,
    "never_skip_fraction": 0.4,
    "perplexity_dense": 7.0,
    "perplexity": 9.1,
    "kl": 0.2,
    "top1_agreement": 0.9,
    "tokens": 800,
    "standard_error": {},
    "verdict": "within the quality budget",
    "within_budget": True,
}


def make_profile(**overrides: Any) -> Profile:
    """A valid profile of a six-layer model; each override goes to the section that has a field of its name."""
    model = {
        "id": "org/tiny",
        "revision": "0123456789" * 4,
        "model_type": "llama",
        "n_layers": 6,
        "hidden_size": 32,
        "config_sha256": "0123456789abcdef" * 4,
    }
    skip = {"rule": "cosine", "cold_s": 1, "cold_e": 5, "threshold": 0.9, "warm_up": 2}
    profile = {"schema": "ffnskip/v1", "compensation": {"kind": "none"}, "made_with": {"ffnskip": "0.1.0"}}
    for name, value in overrides.items():
        owner = {**dict.fromkeys(ModelInfo.model_fields, model), **dict.fromkeys(Skip.model_fields, skip)}
        owner.get(name, profile)[name] = value
    return Profile.model_validate({**profile, "model": model, "skip": skip})


def make_weights(profile: Profile, neurons: int = 48) -> Weights:
    """Random weights that keep the size of what passes through; the FFNs have as many neurons as said."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in profile.weight_shapes.items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = noise / shape[-1] ** 0.5 if len(shape) > 1 else 0.1 * noise
        if name == NEURONS:
            tensors[name] = torch.stack([torch.randperm(neurons, generator=generator)[: shape[1]] for _ in noise])
    return Weights(tensors)


def make_compensated(
    kind: Kind, *, rule: str = "cosine", rank: int | None = None, neurons: int = 0, **overrides: Any
) -> Profile:
    """The profile of `make_profile`, with another rule and compensation and the random weights that they need."""
    plain = make_profile(**overrides)
    compensation = Compensation(kind=kind, rank=rank, neurons=neurons)
    skip = plain.skip.model_copy(update={"rule": rule})
    profile = plain.model_copy(update={"skip": skip, "compensation": compensation})
    return profile.with_weights(make_weights(profile)) if profile.weight_shapes else profile


MEAN = [0.06, 0.94, 0.95, 0.97, 0.98, 0.7]  # similarities by layer
SIMILARITY = {"mean": MEAN, "low": MEAN, "high": MEAN}


def profile_with_curve(mean: list[float], **overrides: Any) -> Profile:
    """A profile with these similarities."""
    similarity = {"mean": mean, "low": [value - 0.01 for value in mean], "high": mean}
    return make_profile(**{"threshold": 0.96, "similarity": similarity, **overrides})


KINDS: list[tuple[Kind, int | None, int]] = [  # with rank and neurons
    *(("none", None, 0), ("mean", None, 0), ("linear", None, 0)),
    *(("linear", None, 4), ("low-rank", 3, 0), ("low-rank", 3, 4)),
]
each_kind = pytest.mark.parametrize(("kind", "rank", "neurons"), KINDS, ids=str)
COMBINATIONS = [
    make_compensated(kind, rule=rule, rank=rank, neurons=neurons)
    for rule in ("cosine", "predicted-damage")
    for kind, rank, neurons in KINDS
    if (rule, kind) != ("cosine", "none")
]
each_combination = pytest.mark.parametrize(
    "profile", COMBINATIONS, ids=lambda p: f"{p.skip.rule}-{p.compensation.kind}-{p.compensation.neurons}"
)


def full() -> Profile:
    """A profile with every tensor that there is beside a low-rank map."""
    return make_compensated("low-rank", rule="predicted-damage", rank=3, neurons=4)


def tensors_of(profile: Profile) -> dict[str, torch.Tensor]:
    assert profile.weights
    return dict(profile.weights.tensors)
