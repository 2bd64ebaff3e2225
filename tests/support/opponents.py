"""Opponents on a pico model."""

from support.pico import pico_profile
from torch import Tensor
from transformers import PreTrainedModel

from ffnskip import Profile
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.opponents import OPPONENTS, Field, Opponent


def field(model: PreTrainedModel, text: Tensor, saved: float, *, profile: Profile | None = None, **skip: int) -> Field:
    """Where opponents of a pico profile save that share of all FLOPs past warm-up."""
    return Field(Lab(model), profile or pico_profile(model, **skip), saved, text)


def opponent(name: str, model: PreTrainedModel, text: Tensor, saved: float, **skip: int) -> Opponent:
    """The one of that name."""
    return OPPONENTS[name](field(model, text, saved, **skip))
