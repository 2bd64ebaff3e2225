"""Small valid objects for tests."""

from typing import Any

from ffnskip.profile import Profile
from ffnskip.sections import ModelInfo, Skip


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
