"""Profiles of the rule `price` for pico models."""

import torch
from support.pico import pico_profile
from transformers import PreTrainedModel

from ffnskip import Profile
from ffnskip.model.parts import parts_of
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.schema import Parts
from ffnskip.profiles.weights import Weights


def price_profile(model: PreTrainedModel, threshold: float = 0.05, **overrides: object) -> Profile:
    """Constants between 0.1 and 1, so that a threshold of 0.05 leaves out some channels of every role."""
    parts = Parts(**{part.role: part.width for part in parts_of(ffn_sites(model)[0].layer)})
    settings = {"rule": "price", "threshold": threshold, "parts": parts.model_dump(), "warm_up": 0, **overrides}
    profile = pico_profile(model, **settings)
    generator = torch.Generator().manual_seed(1)
    constants = {
        name: 0.1 + 0.9 * torch.rand(shape, generator=generator) for name, shape in profile.weight_shapes.items()
    }
    return profile.with_weights(Weights(constants))
