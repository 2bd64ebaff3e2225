"""The model with a profile on: FFN modules that may skip, and the hooks that tell them where in the text they are.

Each FFN of the skip region runs as a `SkippableFFN`; nothing of the model is copied, subclassed or moved, and
`Applied.remove` leaves it as it was.
"""

from __future__ import annotations

import inspect
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor, nn

from ffnskip.compensation.compensator import Compensator
from ffnskip.errors import FfnskipError, FfnskipWarning
from ffnskip.general.sequences import Sequences
from ffnskip.general.skippable import SkippableFFN, skippable
from ffnskip.general.thin import is_thinned, thin
from ffnskip.general.walk import Mode, Walk
from ffnskip.model.sites import decoder_body, ffn_sites
from ffnskip.profiles.profile import Profile
from ffnskip.rules import Rule
from ffnskip.stats import SkipStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnskip.fast.fused_forward import FusedForward, PathName


def refuse_second_profile(model: PreTrainedModel) -> None:
    """Raise FfnskipError when the model has a profile on, or is accelerated."""
    if any(skippable(module) or is_thinned(module) for module in model.modules()):
        raise FfnskipError("The model already has a profile on: take it off with remove() first.")
    if getattr(model.__dict__.get("forward"), "stands_in", False):
        raise FfnskipError("The model is accelerated already: take that off with remove() first.")


class Applied:
    """A profile at work on a model. Also a context manager that takes the profile off at the end.

    Args:
        model: the model, which now skips; also an attribute.
        profile: the profile at work, with the threshold that is used; also an attribute.
        mode: see `mode`.
        rule: decides in place of the profile's own.
        stats: what is skipped is added to these; None starts at zero.
        warns: whether a FfnskipWarning is given if no token was allowed to skip, when the profile is taken off or the
            program ends.
        fused: runs passes over prompts and single tokens, in decode mode; knows no `dense_layers`.
        dense_layers: of the skip region, those that run in full all the same.

    Attributes:
        ffns: what runs in the place of the FFNs of the skip region; empty for a rule that leaves out parts.
        walk: counts.
        asleep: while True, passes run dense and are not counted.
        real: ``[batch, sequence]`` bool, False on padding, of the passes to come if they are given no attention mask
            that shows it; None where there is none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        profile: Profile,
        mode: Mode,
        rule: Rule | None = None,
        stats: SkipStats | None = None,
        warns: bool = False,
        fused: FusedForward | None = None,
        dense_layers: frozenset[int] = frozenset(),
    ) -> None:
        refuse_second_profile(model)
        profile.refuse_missing_weights()
        self.model = model
        self.profile = profile
        self.walk = Walk(profile.skip, mode, stats or SkipStats(profile.model.n_layers), rule)
        self.walk.dense_layers = dense_layers
        self._sites = list(enumerate(ffn_sites(model)))[profile.skip.cold_s : profile.skip.cold_e]
        self._sequences = Sequences(WeakKeyDictionary())
        self.asleep = False
        self.real: Tensor | None = None
        self._had_generate = model.__dict__.get("generate")
        self.ffns: list[SkippableFFN] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._install()
        self._fused = None if fused is None else fused.install(self)
        self._warn_if_idle = finalize(self, _warn_if_idle, self.walk) if warns else None

    @property
    def stats(self) -> SkipStats:
        """What was skipped since the profile was applied or `reset_stats` was called."""
        return self.walk.stats

    @property
    def path(self) -> PathName:
        """`fused` if passes over single tokens are a fused step's, as far as seen; `general` if the model's."""
        return "general" if self._fused is None else self._fused.path

    @property
    def why_general(self) -> str | None:
        """One sentence on why the path is not the fused one; None if it is."""
        return "it was asked for" if self._fused is None else self._fused.why_general

    @property
    def mode(self) -> Mode:
        """`decode` (prompt dense) or `score` (every position counts as generated); may be set between passes."""
        return self.walk.mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self.walk.mode = mode

    def reset_stats(self) -> None:
        """Start counting anew."""
        self.walk.stats = SkipStats(self.profile.model.n_layers)

    def remove(self) -> None:
        """Restore the model as it was, save for where in memory its weights lie. Does nothing the second time."""
        if self._warn_if_idle is not None:
            self._warn_if_idle()
        if self._fused is not None:
            self._fused.remove()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for ffn in self.ffns:
            ffn.uninstall()
        self.ffns = []
        if self.model.__dict__.get("generate") == self._generate:
            del self.model.generate
            if self._had_generate is not None:
                self.model.generate = self._had_generate

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._warn_if_idle is not None:
            self._warn_if_idle.detach()  # there is something else to say
        self.remove()

    def _install(self) -> None:
        if self.walk.rule.leaves_out_parts:
            thinned = [(index, site) for index, site in self._sites if index not in self.walk.dense_layers]
            self._hooks += thin(thinned, self.profile, self.walk)
        else:
            self._wrap_ffns()
        self._own_generate = self.model.generate
        self.model.generate = self._generate
        body = decoder_body(self.model)
        self._signature = inspect.signature(body.forward)
        self._hooks.append(body.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._hooks.append(body.register_forward_hook(self._end))

    @property
    def on(self) -> bool:
        """Whether the profile has not been taken off."""
        return bool(self._hooks)

    @property
    def decoding(self) -> bool:
        """Whether passes may be a fused step's."""
        return not self.asleep and self.mode == "decode"

    def holds_only_prompt(self, length: int) -> bool:
        """Whether a cache's first pass, over so many tokens of each sequence, is nothing but prompt."""
        return self._sequences.holds_only_prompt(length)

    def admit(self, tokens: Tensor, cache: Any, mask: Tensor | None) -> tuple[Tensor, Tensor, SkipStats]:
        """Which tokens of a pass that is a step's may skip, ``[batch, sequence]``; see `Walk.admit`."""
        return self.walk.admit(self._sequences.index(tokens, cache, {}), mask, tokens.numel())

    def count(self, stats: SkipStats) -> None:
        """Add what such a pass has counted."""
        self.walk.count(stats)

    def _wrap_ffns(self) -> None:
        self.ffns = [  # all of them before the model is touched: they may refuse its FFNs
            SkippableFFN(site, index, self.walk, Compensator(self.profile, index - self.profile.skip.cold_s, site.ffn))
            for index, site in self._sites
        ]
        for ffn in self.ffns:
            self._hooks += ffn.install()

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`, which knows how long the prompt is."""
        with self._sequences.generating(_prompt_length(*args, **kwargs)):
            return self._own_generate(*args, **kwargs)

    def _begin(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.asleep:
            return
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        tokens: Tensor = arguments["inputs_embeds" if arguments.get("input_ids") is None else "input_ids"]
        batch, length = tokens.shape[:2]
        cache = arguments.get("past_key_values")
        mask: Any = arguments.get("attention_mask")
        plain = isinstance(mask, Tensor) and mask.dim() == 2  # prepared masks, 4-D or a dict of them, show no padding
        mask = mask[:, -length:].bool() if plain else self.real  # the last columns belong to this pass's tokens
        if self.mode == "score":
            index: Tensor | None = _positions(arguments.get("position_ids"), tokens, cache)
        else:
            index = self._sequences.index(tokens, cache, kwargs)
        self.walk.begin(index, mask, batch * length)

    def _end(self, body: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if self.asleep:
            return
        self.walk.end()
        if self.mode == "decode":
            self._sequences.made(getattr(output, "past_key_values", None))


def _warn_if_idle(walk: Walk) -> None:
    if (sentence := walk.why_idle()) is not None:
        warnings.warn(sentence, FfnskipWarning, stacklevel=4)


def _positions(position: Tensor | None, tokens: Tensor, cache: Any) -> Tensor:
    """``[batch, sequence]``: where each token is in its sequence, as every Hugging Face decoder fills it in."""
    batch, length = tokens.shape[:2]
    if position is None or position.dim() > 2:  # the latter tell places in pictures too, and no longer count tokens
        start = 0 if cache is None else cache.get_seq_length()
        position = (torch.arange(length, device=tokens.device) + start)[None]
    return position.expand(batch, length)


def _prompt_length(inputs: Tensor | None = None, *_: Any, **kwargs: Any) -> int:
    """How many positions the prompt of a call of `generate` has, padding and what is in a cache already included."""
    given = [inputs, *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds", "attention_mask"))]
    return max((tensor.shape[1] for tensor in given if isinstance(tensor, Tensor) and tensor.dim() > 1), default=1)
