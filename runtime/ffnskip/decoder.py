"""`Decoder`: a model and its profile, ready to decode by the fastest path there is for them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor

from ffnskip.decode import GeneralPath, run
from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.fast.fused_path import FusedPath
from ffnskip.general.apply import apply
from ffnskip.general.wrap import Applied, refuse_second_profile
from ffnskip.model.sites import input_device
from ffnskip.profiles.profile import Profile, load_profile
from ffnskip.sampling import GREEDY, Sampling
from ffnskip.stats import SkipStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PathName = Literal["fused", "general"]


class Decoder:
    """Continues prompts with a model, skipping as a profile says.

    >>> decoder = ffnskip.Decoder(model, "profile.yaml")
    >>> for tokens in decoder.decode(input_ids, max_new_tokens=128):
    ...     print(tokenizer.decode(tokens[0]), end="")
    >>> decoder.stats.skip_ratio

    The Llama family takes the *fused* path: compiled code on a CPU, Triton kernels in one CUDA graph on a GPU, over
    weights that lie side by side (`ffnskip.fast`). The model's own modules become views of those; they go on working,
    but must not be moved or converted while a decoder is used. Everything else takes the *general* path, through the
    model's own forward pass.

    Args:
        model: a Hugging Face decoder without a profile on.
        profile: a profile, the path of one, or None to run dense.
        threshold, target: as in `ffnskip.apply`.
        path: `fused` or `general`; None chooses.
        check: prove on the model itself that profile and path do what they say, with a few short forward passes.

    Attributes:
        path: `fused` or `general`.
        why_general: one sentence on why the path is not the fused one; None if it is.
        profile: the profile at work.

    Raises:
        ProfileError, FfnskipError, UnsupportedModelError: as in `ffnskip.apply`; and if `path` is `fused` and the model
            cannot take it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        profile: Profile | str | os.PathLike[str] | None = None,
        *,
        threshold: float | None = None,
        target: float | None = None,
        path: PathName | None = None,
        check: bool = True,
    ) -> None:
        if path not in (*get_args(PathName), None):
            raise FfnskipError(f"The path must be one of {', '.join(get_args(PathName))}, not {path!r}.")
        refuse_second_profile(model)
        self._model = model
        self.profile: Profile | None = None
        if profile is not None:
            loaded = profile if isinstance(profile, Profile) else load_profile(profile)
            with apply(model, loaded, threshold=threshold, target=target, check=check) as applied:
                self.profile = applied.profile
        self.why_general: str | None = "it was asked for" if path == "general" else None
        self._fused: FusedPath | None = None
        self._earlier = SkipStats(model.config.get_text_config().num_hidden_layers)
        self._applied: Applied | None = None
        if path != "general":
            self._try_fused(check, required=path == "fused")

    @property
    def path(self) -> PathName:
        """Which path is taken."""
        return "general" if self._fused is None else "fused"

    @property
    def stats(self) -> SkipStats:
        """What was skipped since the decoder was made or `reset_stats` was called."""
        total = SkipStats(self._earlier.n_layers)
        total.add(self._earlier)
        for current in (self._fused, self._applied):
            if current is not None:
                total.add(current.stats)
        return total

    def seconds(self) -> dict[str, float] | None:
        """Time that the parts of all steps have taken so far, in seconds; None on a path that does not measure it."""
        return None if self._fused is None else self._fused.seconds()

    def reset_stats(self) -> None:
        """Start counting anew."""
        self._earlier = SkipStats(self._earlier.n_layers)
        if self._fused is not None:
            self._fused.reset_stats()
        if self._applied is not None:
            self._applied.reset_stats()

    def decode(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        sampling: Sampling = GREEDY,
        stop_tokens: Collection[int] = (),
    ) -> Iterator[Tensor]:
        """Continue each prompt of a batch; arguments and what is yielded are those of `ffnskip.decode`.

        Finish one decode before the next is started: they share the key-value cache, and only the latest can go on.
        """
        refuse_second_profile(self._model)
        place = input_device(self._model)
        input_ids = input_ids.to(place)
        attention_mask = None if attention_mask is None else attention_mask.to(place)
        asked = input_ids, attention_mask, max_new_tokens, sampling, stop_tokens
        if self._fused is not None and self._fused.takes(input_ids, attention_mask, max_new_tokens):
            return run(self._fused.begin(max_new_tokens), *asked)
        tokens = run(GeneralPath(self._model), *asked)
        return tokens if self.profile is None else self._while_applied(self.profile, tokens)

    def _while_applied(self, profile: Profile, tokens: Iterator[Tensor]) -> Iterator[Tensor]:
        """Each token with the profile on the model, from the first to the last."""
        with Applied(self._model, profile, "decode") as self._applied:
            try:
                yield from tokens
            finally:
                self._earlier.add(self._applied.stats)
                self._applied = None

    def _try_fused(self, check: bool, *, required: bool) -> None:
        try:
            fused = FusedPath(self._model, self.profile)
            if check:
                fused.check()
        except UnsupportedModelError as error:
            if required:
                raise
            self.why_general = str(error)
        else:
            self._fused = fused
