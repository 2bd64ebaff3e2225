"""`Decoder`: a model and its profile, ready to decode by the fastest path there is for them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, get_args

from torch import Tensor

from ffnskip.arguments import check_decode
from ffnskip.decode import DecodePath, GeneralPath, generate_tokens
from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.fast.engine import FusedEngine
from ffnskip.fast.fused_forward import PathName
from ffnskip.fast.fused_model import FusedModel
from ffnskip.fast.fused_path import FusedDecodes
from ffnskip.fast.guard import altered
from ffnskip.fast.products import multiply
from ffnskip.general.apply import fitting
from ffnskip.general.wrap import Applied, refuse_second_profile
from ffnskip.model.sites import input_device
from ffnskip.profiles.profile import Profile
from ffnskip.sampling import GREEDY, Sampling
from ffnskip.stats import SkipStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Decoder:
    """Continues prompts with a model, skipping as a profile says.

    >>> decoder = ffnskip.Decoder(model, "profile.yaml")
    >>> for tokens in decoder.decode(input_ids, max_new_tokens=128):
    ...     print(tokenizer.decode(tokens[0]), end="")
    >>> decoder.stats.skip_ratio

    The Llama family takes the *fused* path: compiled code on a CPU, Triton kernels in one CUDA graph on a GPU, over
    weights that lie side by side (`ffnskip.fast`). The model's own modules become views of those, and go on working.
    When weights have changed since, the next decode reads them anew. Everything else takes the *general* path, through
    the model's own forward pass; so does a model with hooks, which a fused step would not run.

    Args:
        model: a Hugging Face decoder without a profile on.
        profile: as in `ffnskip.apply`, or None to run dense.
        threshold, target, other_weights: as in `ffnskip.apply`.
        path: `fused` or `general`; None chooses, for each decode.
        check: prove on the model itself that profile and path do what they say, with a few short forward passes.

    Attributes:
        path: `fused` or `general`: which one the latest decode took; before the first, which one is ready.
        why_general: one sentence on why it is not the fused one; None if it is.
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
        other_weights: bool = False,
    ) -> None:
        if path not in (*get_args(PathName), None):
            raise FfnskipError(f"The path must be one of {', '.join(get_args(PathName))}, not {path!r}.")
        if profile is None and (threshold is not None or target is not None):
            raise FfnskipError("A threshold or a target moves a profile, and there is none.")
        refuse_second_profile(model)
        self._model = model
        self._check, self._fused_only = check, path == "fused"
        self.profile: Profile | None = None
        if profile is not None:
            self.profile = fitting(
                model, profile, threshold=threshold, target=target, check=check, other_weights=other_weights
            )
        self.why_general: str | None = "it was asked for" if path == "general" else None
        n_layers = (
            model.config.get_text_config().num_hidden_layers if self.profile is None else self.profile.model.n_layers
        )
        self._stats = SkipStats(n_layers)
        self._applied: Applied | None = None
        self._engine: FusedEngine | None = None
        self._fused: FusedDecodes | None = None  # by the engine
        if path != "general":
            self._read_weights()

    @property
    def path(self) -> PathName:
        """See the class."""
        return "fused" if self.why_general is None else "general"

    @property
    def fused(self) -> FusedModel | None:
        """The model as the fused path reads it; None where that is not taken."""
        return self._engine.fused if self._engine is not None and self.why_general is None else None

    @property
    def stats(self) -> SkipStats:
        """What was skipped since the decoder was made or `reset_stats` was called."""
        if self._fused is not None:
            self._fused.drain_counts()
        return deepcopy(self._stats)

    def seconds(self) -> dict[str, float] | None:
        """Time that the parts of all steps have taken so far, in seconds; None on a path that does not measure it."""
        return None if self._fused is None else self._fused.seconds()

    def reset_stats(self) -> None:
        """Start counting anew."""
        if self._fused is not None:
            self._fused.drain_counts()
        self._stats.clear()

    def decode(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        sampling: Sampling = GREEDY,
        stop_tokens: Collection[int] = (),
        forced: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Continue each prompt of a batch.

        Finish one decode before the next is started: they share the key-value cache, and only the latest can go on.

        Args:
            input_ids: the prompts, ``[batch, prompt]``, padded on the left.
            max_new_tokens: how many tokens to yield at most.
            attention_mask: ``[batch, prompt]``, 0 on padding; None where there is none.
            sampling: greedy or sampled.
            stop_tokens: a row ends with the first of these; the loop ends when every row has.
            forced: ``[batch, max_new_tokens or more]``, tokens to yield and to feed back whatever the model chooses
                (teacher forcing): it decodes along a text.

        Yields:
            The next token of every row, ``[batch]``. Rows that have ended repeat their stop token.

        Raises:
            FfnskipError: an argument is of another type or shape; the prompts are padded on the right; or the decoder
                is for the path `fused` alone, and that cannot take this decode.
        """
        if self._applied is not None:  # of a decode that was left off
            self._applied.remove()
            self._applied = None
        refuse_second_profile(self._model)
        check_decode(self._model, input_ids, max_new_tokens, attention_mask, sampling, stop_tokens, forced)
        device = input_device(self._model)
        input_ids = input_ids.to(device)
        forced = None if forced is None else forced.to(device)
        attention_mask = None if attention_mask is None else attention_mask.to(device)
        fused = self._fused_for(input_ids, max_new_tokens)
        path: DecodePath = GeneralPath(self._model, multiply) if fused is None else fused.path(max_new_tokens)
        tokens = generate_tokens(
            path,
            input_ids,
            max_new_tokens=max_new_tokens,
            attention_mask=attention_mask,
            sampling=sampling,
            stop_tokens=stop_tokens,
            forced=forced,
        )
        return tokens if fused or self.profile is None else self._with_profile_applied(self.profile, tokens)

    def _with_profile_applied(self, profile: Profile, tokens: Iterator[Tensor]) -> Iterator[Tensor]:
        """Between two tokens the profile sleeps, or whatever else the caller does with the model would skip, too."""
        with Applied(self._model, profile, "decode", stats=self._stats) as applied:
            self._applied = applied
            for token in tokens:
                applied.asleep = True
                yield token
                if self._applied is not applied:
                    raise FfnskipError("Another decode was started with this decoder: finish one before the next.")
                applied.asleep = False

    def _fused_for(self, prompts: Tensor, max_new_tokens: int) -> FusedDecodes | None:
        """The fused path if it can take this decode, with the model's weights as they are now."""
        if self._fused is not None and self._engine is not None and self._engine.stale:
            self._fused.drain_counts()
            self._engine = self._fused = None  # or the weights would be held twice while they are read
            self._read_weights()
        if self._fused is None:
            return None
        batch, length = prompts.shape
        self.why_general = self._fused.engine.why_not(batch, length + max_new_tokens) or altered(self._model)
        if self.why_general is None:
            return self._fused
        if self._fused_only:
            raise UnsupportedModelError(self.why_general)
        return None

    def _read_weights(self) -> None:
        try:
            if reason := altered(self._model):
                raise UnsupportedModelError(reason)
            engine = FusedEngine(self._model, self.profile)
            fused = FusedDecodes(engine, self._stats)
            if self._check:
                engine.check(self._model)
        except UnsupportedModelError as error:
            if self._fused_only:
                raise
            self.why_general = str(error)
        else:
            self._engine, self._fused = engine, fused
