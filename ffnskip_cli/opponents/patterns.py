"""Whole FFNs by layer and position, never by the token, and nothing in their place: the paper's Table 3, and `static`.

All skip between the first two and the last two layers, where it does least harm, or as many of them as the saving
leaves. Where a saving asks for a fraction of an FFN per token, one more is skipped for that share of the tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ffnskip.general.wrap import Applied
from ffnskip.model.forward import forward
from ffnskip.model.sites import input_device, watch
from ffnskip.profiles.profile import Profile
from ffnskip.rules import Rule, SkipSettings, Turn
from ffnskip.rules.cosine import similarity
from ffnskip_cli.opponents.field import Field, Opponent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COLD = 2  # layers at either end


@dataclass(frozen=True)
class Pattern:
    """Which FFNs to skip, by layer and position.

    Attributes:
        order: the layers that may be skipped, the first to be skipped in front.
        first, last: how many FFNs are skipped at the first and at the last position past warm-up; linear in between.
        at_random: skip every FFN of `order` independently, and only the expected number is `first` to `last`.
    """

    order: Sequence[int]
    first: float
    last: float
    at_random: bool = False

    def draw(self, tokens: int, n_layers: int, seed: int) -> Tensor:
        """``[tokens, n_layers]`` bool: True where the FFN is skipped, for the positions past warm-up."""
        generator = torch.Generator().manual_seed(seed)
        wanted = torch.linspace(self.first, self.last, tokens, dtype=torch.float64)
        if self.at_random:
            chances = torch.rand(tokens, len(self.order), generator=generator)
            chosen = chances < wanted[:, None] / max(len(self.order), 1)
        else:  # whole numbers whose sum is at every position that of the wanted ones, up or down from a random start
            start = torch.rand(1, generator=generator, dtype=torch.float64)
            counts = (start + wanted.cumsum(0)).floor().diff(prepend=torch.zeros(1, dtype=torch.float64))
            chosen = torch.arange(len(self.order)) < counts[:, None]
        skipped = torch.zeros(tokens, n_layers, dtype=torch.bool)
        skipped[:, list(self.order)] = chosen
        return skipped

    def applied(self, model: PreTrainedModel, profile: Profile, sequence: Tensor) -> Applied:
        """See `ffnskip_cli.measure.quality.Way`."""
        return Applied(model, profile, "score", self.rule(profile, sequence))

    def rule(self, profile: Profile, sequence: Tensor) -> Rule:
        """Skips so in one forward pass over ``sequence [length]``, whose checksum is the seed."""
        warm_up, n_layers = profile.skip.warm_up, profile.model.n_layers
        seed = zlib.crc32(sequence.cpu().numpy().tobytes())
        past = self.draw(len(sequence) - warm_up, n_layers, seed)
        return PatternRule(F.pad(past, (0, 0, warm_up, 0)))


class PatternRule(Rule):
    """Skips where ``pattern [tokens, n_layers]`` says, and reads nothing."""

    name = "pattern"
    never = 0.0
    steps = range(1)
    decides_by = "layer and position"

    def __init__(self, pattern: Tensor) -> None:
        self.pattern = pattern

    def threshold_at(self, step: int) -> float:
        """It has no threshold."""
        return self.never

    def strictness(self, threshold: float) -> float:
        """It has no threshold."""
        return 0.0

    def turn(self, skip: SkipSettings, allowed: Tensor) -> Turn:
        """See `Rule`."""
        return _PatternTurn(skip, allowed, self.pattern)

    def sentence(self, skip: SkipSettings, layers: str) -> str:
        """See `Rule`."""
        return f"In {layers}, each feed-forward block (FFN) is skipped where a fixed pattern says so."


class _PatternTurn(Turn):
    def __init__(self, skip: SkipSettings, allowed: Tensor, pattern: Tensor) -> None:
        super().__init__(skip, allowed)
        self._pattern = pattern.to(allowed.device)

    def skipping(self, layer: int, value: Tensor | None) -> Tensor:
        return self._pattern[:, layer] & self.allowed


def random(field: Field) -> Opponent:
    """Skips each FFN independently with one probability."""
    return _opponent(field, lambda layers, count: Pattern(layers, count, count, at_random=True))


def non_adaptive(field: Field) -> Opponent:
    """Skips the same FFNs for every token, evenly spread over the layers."""
    return _opponent(field, lambda layers, count: Pattern(_spread(layers, count), count, count))


def static(field: Field) -> Opponent:
    """Skips the same FFNs for every token, those with the highest mean similarity cos(h, h + f) on the sample."""
    similarities = ffn_similarities(field)
    return _opponent(field, lambda layers, count: Pattern(_most_similar(layers, similarities), count, count))


def _opponent(field: Field, pattern: Callable[[Sequence[int], float], Pattern]) -> Opponent:
    """One that skips as many FFNs per token as the saving takes, of the layers that may be skipped."""
    n_layers = field.cost.n_layers
    field.refuse_beyond(most := field.cost.ffn_share(field.first, field.length))
    count = n_layers * field.saved / most
    cold = min(_COLD, int((n_layers - count) / 2))
    return Opponent(field.bare(), pattern(range(cold, n_layers - cold), count))


@torch.inference_mode()
def ffn_similarities(field: Field) -> list[float]:
    """How little each FFN turns what passes through it: the mean of cos(h, h + f) on the sample, by layer."""
    field.refuse_without_stream()
    sums = [0.0] * field.cost.n_layers

    def see(layer: int, h: Tensor, f: Tensor) -> None:
        sums[layer] += float(similarity(h, f)[:, field.first :].mean())

    with watch(field.model, see):
        for sequence in field.lab.track(field.sample, "ranking FFNs", len(field.sample)):
            forward(field.model, sequence[None].long().to(input_device(field.model)), use_cache=False)
    return [total / len(field.sample) for total in sums]


def _most_similar(layers: Sequence[int], similarities: Sequence[float]) -> tuple[int, ...]:
    return tuple(sorted(layers, key=lambda layer: similarities[layer], reverse=True))


def _spread(layers: Sequence[int], count: float) -> tuple[int, ...]:
    """As many of the layers as it takes to skip `count`, at even distances."""
    n = ceil(round(count, 6))
    return tuple(layers[int((i + 0.5) * len(layers) / n)] for i in range(n))
