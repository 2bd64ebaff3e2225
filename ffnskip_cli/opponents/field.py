"""What every opponent is set up with, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.model.types import refuse_type
from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Compensation, Skip
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.measure.flops import ModelCost, model_cost
from ffnskip_cli.measure.quality import Way

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Opponent:
    """Another way to save FLOPs, set to a saving.

    Attributes:
        profile: its warm-up, and its rule if it is one.
        way: what skips in the place of the profile's rule; None for that rule itself.
    """

    profile: Profile
    way: Way | None = None


@dataclass(frozen=True)
class Field:
    """Where opponents meet a profile.

    Attributes:
        lab: with the dense model.
        profile: that they are compared with, whose warm-up they share unless their paper has one of its own.
        saved: the share of all FLOPs past warm-up that each is to save, net of what it adds.
        sample: ``[sequences, length]``, text to set them up on: to rank layers, take quantiles, solve thresholds.
    """

    lab: Lab
    profile: Profile
    saved: float
    sample: Tensor

    @property
    def model(self) -> PreTrainedModel:
        """The dense model."""
        return self.lab.model

    @property
    def first(self) -> int:
        """The first position past warm-up."""
        return self.profile.skip.warm_up

    @property
    def length(self) -> int:
        """Of a sequence."""
        return self.sample.shape[1]

    @cached_property
    def cost(self) -> ModelCost:
        """Of the model."""
        return model_cost(self.model)

    @property
    def flops_per_token(self) -> float:
        """Of the dense model, for a mean token past warm-up."""
        return self.cost.dense_flops(self.first, self.length) / (self.length - self.first)

    def refuse_without_stream(self) -> None:
        """Raise FfnskipError for a model of whose layers an opponent cannot see what an FFN adds to the stream."""
        try:
            refuse_type(self.model.config, needs_stream=True)
        except UnsupportedModelError:
            kind = self.model.config.get_text_config().model_type
            raise FfnskipError(f"models of type {kind!r} do more with an FFN's output than to add it") from None

    def refuse_beyond(self, most: float) -> None:
        """Raise FfnskipError if an opponent can save no more than `most`, and that is too little."""
        if self.saved > most:
            raise FfnskipError(f"it saves at most {max(most, 0.0):.3f} of the FLOPs")

    def bare(self, **skip: object) -> Profile:
        """A profile of the same model and warm-up, without compensation, whose rule is `cosine` with these settings."""
        usual = {"cold_s": 0, "cold_e": self.profile.model.n_layers, "threshold": 1.0, "warm_up": self.first}
        return Profile(
            schema="ffnskip/v1",
            model=self.profile.model,
            skip=Skip.model_validate({"rule": "cosine", **usual, **skip}),
            compensation=Compensation(kind="none"),
            made_with=self.profile.made_with,
        )
