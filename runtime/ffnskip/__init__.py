"""The ffnskip runtime: load a skip profile and decode a Hugging Face model with it.

>>> import ffnskip
>>> applied = ffnskip.apply(model, "profile.yaml")
>>> model.generate(**inputs)
>>> applied.stats.skip_ratio

A name is imported when it is first used, so that reading a profile does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ffnskip.on_import import on_import

if TYPE_CHECKING:
    from ffnskip.decoder import Decoder
    from ffnskip.errors import FfnskipError, FfnskipWarning, ProfileError, UnsupportedModelError
    from ffnskip.general.apply import accelerate, apply
    from ffnskip.general.wrap import Applied
    from ffnskip.model.packed import pack_weights
    from ffnskip.model.packed_folder import load_packed, save_packed
    from ffnskip.profiles.profile import Profile, load_profile, save_profile
    from ffnskip.quantizer import FFNSkipConfig
    from ffnskip.sampling import Sampling
    from ffnskip.stats import SkipStats

__version__ = "0.1.0"

__all__ = [
    "Applied",
    "Decoder",
    "FFNSkipConfig",
    "FfnskipError",
    "FfnskipWarning",
    "Profile",
    "ProfileError",
    "Sampling",
    "SkipStats",
    "UnsupportedModelError",
    "accelerate",
    "apply",
    "load_packed",
    "load_profile",
    "pack_weights",
    "save_packed",
    "save_profile",
]

_MODULES = {
    "Applied": "general.wrap",
    "Decoder": "decoder",
    "FFNSkipConfig": "quantizer",
    "FfnskipError": "errors",
    "FfnskipWarning": "errors",
    "Profile": "profiles.profile",
    "ProfileError": "errors",
    "Sampling": "sampling",
    "SkipStats": "stats",
    "UnsupportedModelError": "errors",
    "accelerate": "general.apply",
    "apply": "general.apply",
    "load_packed": "model.packed_folder",
    "load_profile": "profiles.profile",
    "pack_weights": "model.packed",
    "save_packed": "model.packed_folder",
    "save_profile": "profiles.profile",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# transformers then knows the folders of models that were saved with a profile.
on_import("transformers.quantizers.auto", lambda: import_module("ffnskip.quantizer"))
