"""How the next token is chosen from the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnskip.errors import FfnskipError

MIN_TEMPERATURE = 1e-4  # logits divided by less would overflow


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else sampled from the `top_p` nucleus with `seed`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature == 0.0 or MIN_TEMPERATURE <= self.temperature < float("inf")):
            raise FfnskipError(
                f"The temperature must be 0 (greedy), or finite and at least {MIN_TEMPERATURE}, not {self.temperature}."
            )
        if not 0.0 < self.top_p <= 1.0:
            raise FfnskipError(f"top_p must be more than 0 and at most 1, not {self.top_p}.")

    def chooser(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """A function from logits ``[batch, vocabulary]`` to tokens ``[batch]``; when it samples, it has a state."""
        if self.temperature == 0.0:
            return _likeliest
        generator = torch.Generator(device).manual_seed(self.seed)

        def sample(logits: Tensor) -> Tensor:
            probabilities = _nucleus(logits.float() / self.temperature, self.top_p).softmax(dim=-1)
            return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

        return sample


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The logits of the likeliest tokens that make up `top_p` together, and -inf (Holtzman et al. 2020).

    As transformers has it, whose own would have to be imported.
    """
    if top_p == 1.0:
        return logits
    ascending, order = logits.sort(dim=-1)
    unlikely = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    unlikely[:, -1] = False
    return logits.masked_fill(unlikely.scatter(-1, order, unlikely), -torch.inf)


def _likeliest(logits: Tensor) -> Tensor:
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        return torch.from_numpy(logits.numpy().argmax(axis=-1))  # ten times as fast as torch for a few rows
    return logits.argmax(dim=-1)


GREEDY = Sampling()
