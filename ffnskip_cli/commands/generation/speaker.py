"""What `ffnskip generate` needs of a model: words as tokens, tokens as words, and a decoder between them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from ffnskip.profiles.profile import Profile
    from ffnskip.sampling import Sampling
    from ffnskip.stats import SkipStats


class Decodes(Protocol):
    """What of `ffnskip.Decoder` makes an answer."""

    profile: Profile | None

    @property
    def stats(self) -> SkipStats:
        """What was skipped."""
        ...

    def decode(
        self, input_ids: Tensor, *, max_new_tokens: int, sampling: Sampling, stop_tokens: Collection[int]
    ) -> Iterator[Tensor]:
        """See `ffnskip.Decoder.decode`."""
        ...


class Speaker(Protocol):
    """A model that answers a prompt.

    Attributes:
        prompt: ``[1, prompt]`` token ids.
        format: of the matrices, such as bfloat16; the smallest one where there are several.
    """

    prompt: Tensor
    format: str

    @property
    def decoder(self) -> Decodes:
        """Continues the prompt, with the profile if there is one."""
        ...

    @property
    def stop_tokens(self) -> Collection[int]:
        """What ends an answer."""
        ...

    def text(self, tokens: list[int]) -> str:
        """An answer's tokens as words."""
        ...
