"""The wrapped model: FFN modules that may skip, and the hooks that tell them where in the text they are.

Each FFN module of the skip region is replaced by a `SkippableFFN` that holds it; nothing of the model is copied or
subclassed, and `Applied.remove` restores the very same module objects.
"""

from __future__ import annotations

import inspect
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ffnskip.compensation.compensator import Compensator
from ffnskip.errors import FfnskipError
from ffnskip.general.thin import is_thinned, thin
from ffnskip.general.walk import Mode, Walk
from ffnskip.model.sites import FFNSite, decoder_body, ffn_sites
from ffnskip.profiles.profile import Profile
from ffnskip.rules import Rule
from ffnskip.stats import SkipStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SkippableFFN(nn.Module):
    """Stands where a decoder layer's FFN stood, and runs it only for the tokens that do not skip.

    In sandwich-norm models it holds the norm behind the FFN too, so that what it returns is what is added to the
    residual stream (`ffnskip.model.sites.FFNSite`).

    Attributes:
        calls: forward passes so far.
        skipping: ``[N]`` bool, which tokens of the latest pass skipped; None if none was allowed to.
        compensator: gives what is added where the FFN is skipped.
    """

    def __init__(self, site: FFNSite, index: int, walk: Walk, compensator: Compensator) -> None:
        super().__init__()
        self.ffn = site.layer.get_submodule("mlp")
        self.norm_after = site.child(site.norm_after)
        self.calls = 0
        self.skipping: Tensor | None = None
        self.compensator = compensator
        self._site = site
        self._index = index
        self._walk = walk
        self._h: Tensor | None = None

    def enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the norm in front: keep the residual stream it reads."""
        self._h = args[0]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` and the result ``[batch, sequence, hidden]``."""
        self.calls += 1
        h = x if self._site.norm_before is None else self._h
        self._h = None  # hold no activations longer than the layer does
        self.skipping = None
        if not self._walk.active:
            return self.run(x)
        assert h is not None, "the norm in front of the FFN was not called"
        return self._run_unless_skipped(x, h.flatten(0, -2))

    def run(self, x: Tensor) -> Tensor:
        """``f`` for ``x [batch, sequence, hidden]``, whatever the rule says."""
        f: Tensor = self.ffn(x)
        return f if self.norm_after is None else self.norm_after(f)

    def _added(self, f: Tensor) -> Tensor:
        return f if self._site.scale == 1.0 else f * self._site.scale

    def _run_unless_skipped(self, x: Tensor, h: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        skipping, n_skipping = self._walk.skipping(self._index, x.device, self.compensator.probe(flat))
        self.skipping = skipping
        if n_skipping == 0:
            f = self.run(x)
            self._walk.observe(self._index, h, self._added(f.flatten(0, -2)), None)
            return f
        if n_skipping == len(skipping):
            return self.compensator.added(flat).view_as(x)
        rows, skipped = (~skipping).nonzero().squeeze(1), skipping.nonzero().squeeze(1)
        f = self.run(flat[None, rows])[0]
        self._walk.observe(self._index, h[rows], self._added(f), rows)
        output = f.new_empty(flat.shape)  # under autocast f is narrower than x
        output[rows] = f
        output[skipped] = self.compensator.added(flat[skipped]).to(f.dtype)
        return output.view_as(x)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The weights under the names they have without the wrapper, so that a model saved meanwhile is complete."""
        if self.norm_after is not None:
            norm_prefix = f"{prefix.removesuffix('mlp.')}{self._site.norm_after}."
            self.norm_after.state_dict(*args, prefix=norm_prefix, **kwargs)
        return self.ffn.state_dict(*args, prefix=prefix, **kwargs)


def refuse_second_profile(model: PreTrainedModel) -> None:
    """Raise FfnskipError when the model has a profile on."""
    if any(isinstance(module, SkippableFFN) or is_thinned(module) for module in model.modules()):
        raise FfnskipError("The model already has a profile on: take it off with remove() first.")


class Applied:
    """A profile at work on a model. Also a context manager that takes the profile off at the end.

    Args:
        model: the model, which now skips; also an attribute.
        profile: the profile at work, with the threshold that is used; also an attribute.
        mode: see `mode`.
        rule: decides in place of the profile's own.
        stats: what is skipped is added to these; None starts at zero.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        profile: Profile,
        mode: Mode,
        rule: Rule | None = None,
        stats: SkipStats | None = None,
    ) -> None:
        refuse_second_profile(model)
        profile.refuse_missing_weights()
        self.model = model
        self.profile = profile
        self._walk = Walk(profile.skip, mode, stats or SkipStats(profile.model.n_layers), rule)
        self._sites = list(enumerate(ffn_sites(model)))[profile.skip.cold_s : profile.skip.cold_e]
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._install()

    @property
    def stats(self) -> SkipStats:
        """What was skipped since the profile was applied or `reset_stats` was called."""
        return self._walk.stats

    @property
    def mode(self) -> Mode:
        """`decode` (prompt dense) or `score` (every position counts as generated); may be set between passes."""
        return self._walk.mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._walk.mode = mode

    def reset_stats(self) -> None:
        """Start counting anew."""
        self._walk.stats = SkipStats(self.profile.model.n_layers)

    def remove(self) -> None:
        """Restore the model as it was. Does nothing the second time."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for _, site in self._sites:
            wrapper = site.layer.mlp
            if isinstance(wrapper, SkippableFFN):
                site.layer.mlp = wrapper.ffn
                if site.norm_after is not None:
                    setattr(site.layer, site.norm_after, wrapper.norm_after)

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _install(self) -> None:
        if self._walk.rule.leaves_out_parts:
            self._hooks += thin([(index, site.layer) for index, site in self._sites], self.profile, self._walk)
        else:
            self._wrap_ffns()
        body = decoder_body(self.model)
        self._signature = inspect.signature(body.forward)
        self._hooks.append(body.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._hooks.append(body.register_forward_hook(self._end))

    def _wrap_ffns(self) -> None:
        compensators = [  # all of them before the model is touched: they may refuse its FFNs
            Compensator(self.profile, index - self.profile.skip.cold_s, site.layer.get_submodule("mlp"))
            for index, site in self._sites
        ]
        for (index, site), compensator in zip(self._sites, compensators, strict=True):
            wrapper = SkippableFFN(site, index, self._walk, compensator)
            if (norm_before := site.child(site.norm_before)) is not None:
                self._hooks.append(norm_before.register_forward_pre_hook(wrapper.enter))
            site.layer.mlp = wrapper
            if site.norm_after is not None:
                setattr(site.layer, site.norm_after, nn.Identity())

    def _begin(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        tokens: Tensor = arguments["inputs_embeds" if arguments.get("input_ids") is None else "input_ids"]
        batch, length = tokens.shape[:2]
        position = arguments.get("position_ids")
        if position is None:  # as every Hugging Face decoder fills it in
            cache = arguments.get("past_key_values")
            start = 0 if cache is None else cache.get_seq_length()
            position = (torch.arange(length, device=tokens.device) + start)[None]
        mask: Any = arguments.get("attention_mask")
        plain = isinstance(mask, Tensor) and mask.dim() == 2  # prepared masks, 4-D or a dict of them, show no padding
        mask = mask[:, -length:].bool() if plain else None  # the last columns belong to this pass's tokens
        self._walk.begin(position.expand(batch, length), mask)

    def _end(self, body: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self._walk.end()
