"""The ffnskip runtime: load a skip profile and decode a Hugging Face model with it.

>>> import ffnskip
>>> applied = ffnskip.apply(model, "profile.yaml")
>>> model.generate(**inputs)
>>> applied.stats.skip_ratio
"""

from ffnskip.decoder import Decoder
from ffnskip.errors import FfnskipError, ProfileError, UnsupportedModelError
from ffnskip.general.apply import apply
from ffnskip.general.wrap import Applied
from ffnskip.model.packed import pack_weights
from ffnskip.profiles.profile import Profile, load_profile, save_profile
from ffnskip.sampling import Sampling
from ffnskip.stats import SkipStats

__version__ = "0.1.0"

__all__ = [
    "Applied",
    "Decoder",
    "FfnskipError",
    "Profile",
    "ProfileError",
    "Sampling",
    "SkipStats",
    "UnsupportedModelError",
    "apply",
    "load_profile",
    "pack_weights",
    "save_profile",
]
