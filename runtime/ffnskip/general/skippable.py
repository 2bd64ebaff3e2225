"""An FFN that runs only for the tokens that do not skip, in the place of a decoder layer's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ffnskip.compensation.compensator import Compensator
from ffnskip.errors import UnsupportedModelError
from ffnskip.general.walk import Walk
from ffnskip.model.sites import FFNSite, first_output

_EXTRAS: dict[type[nn.Module], int] = {}  # how many outputs an FFN of this type has beside its hidden states


class SkippableFFN:
    """The `forward` of an FFN while a profile is on.

    It replaces that of the FFN's first module, as an attribute of the module, so that names, adapters and state dict of
    the model stay what they are. What else belongs to the FFN (`FFNSite.modules`), such as the norm of sandwich-norm
    models, is run in here and does nothing in its own place: what this returns is what is added to the stream.

    Attributes:
        site: where the FFN is.
        calls: forward passes so far.
        compensator: gives what is added where the FFN is skipped.
    """

    def __init__(self, site: FFNSite, index: int, walk: Walk, compensator: Compensator) -> None:
        self.site = site
        self.calls = 0
        self.compensator = compensator
        self._index = index
        self._walk = walk
        self._forwards = [module.forward for module in site.modules]
        self._had = [module.__dict__.get("forward") for module in site.modules]  # accelerate has put its own there

    @property
    def skipping(self) -> Tensor | None:
        """``[N]`` bool, which tokens of the pass that is under way skipped here; None if none was allowed to."""
        return self._walk.scratch.get((self, "skipping"))

    def install(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Take the FFN's place; returns the hooks that this needs."""
        first, *rest = self.site.modules
        first.forward = self.forward
        for module in rest:
            beside = self.site.join == "sum" and module in self.site.parts
            module.forward = torch.zeros_like if beside else _pass_on
        norm, reads_output = self.site.norm_before, self._walk.rule.reads == "output"
        return [norm.register_forward_pre_hook(self._enter)] if reads_output and norm is not None else []

    def uninstall(self) -> None:
        """Give the FFN its place back."""
        for module, had in zip(self.site.modules, self._had, strict=True):
            module.__dict__.pop("forward", None)
            if had is not None:
                module.forward = had

    def _enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the norm in front: keep the residual stream it reads."""
        self._walk.scratch[self, "h"] = args[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the FFN's own forward takes, ``x [..., hidden]``, and gives."""
        x, *others = [given for given in (*args, *kwargs.values()) if given is not None]
        if others:
            raise UnsupportedModelError(
                f"The FFN of layer {self._index} is given more than its input, so it cannot be skipped alone."
            )
        self.calls += 1
        if not self._walk.active:
            return self._run(x)
        h = x if self.site.norm_before is None else self._walk.scratch.pop((self, "h"), None)
        return self._run_unless_skipped(x, None if h is None else h.flatten(0, -2))

    def run(self, x: Tensor) -> Tensor:
        """``f`` for ``x [..., hidden]``, whatever the rule says."""
        return first_output(self._run(x)).view_as(x)

    def _run(self, x: Tensor) -> Any:
        """``f``, alone or in a tuple with what the FFN gives beside it."""
        parts = self._forwards[: len(self.site.parts)]
        output = parts[0](x)
        for forward in parts[1:]:
            output = output + forward(x) if self.site.join == "sum" else forward(output)
        f, *extras = (output,) if isinstance(output, Tensor) else output
        _EXTRAS[type(self.site.ffn)] = len(extras)
        for forward in self._forwards[len(parts) :]:
            f = forward(f)
        return (f, *extras) if extras else f

    def _extras(self, x: Tensor) -> int:
        kind = type(self.site.ffn)
        if kind not in _EXTRAS:
            self._run(x[None, :1])
        return _EXTRAS[kind]

    def _observe(self, h: Tensor | None, f: Tensor, rows: Tensor | None) -> None:
        if self._walk.rule.reads == "output":
            assert h is not None, "the norm in front of the FFN was not called"
            f = f if self.site.scale == 1.0 else f * self.site.scale
            self._walk.observe(self._index, h if rows is None else h[rows], f, rows)

    def _run_unless_skipped(self, x: Tensor, h: Tensor | None) -> Any:
        flat = x.flatten(0, -2)
        skipping, n_skipping = self._walk.skipping(self._index, flat, self.compensator.probe(flat))
        self._walk.scratch[self, "skipping"] = skipping
        if n_skipping == 0:
            whole = self._run(x)
            self._observe(h, first_output(whole).flatten(0, -2), None)
            return whole
        if n_skipping == len(skipping):
            output, extras = self.compensator.added(flat), [None] * self._extras(flat)
        else:
            rows, skipped = (~skipping).nonzero().squeeze(1), skipping.nonzero().squeeze(1)
            ran = self._run(flat[rows].view(*[1] * (x.dim() - 2), len(rows), -1))
            f, *extras = (ran,) if isinstance(ran, Tensor) else ran
            f = f.view(len(rows), -1)
            self._observe(h, f, rows)
            output = f.new_empty(flat.shape)  # under autocast f is narrower than x
            output[rows] = f
            output[skipped] = self.compensator.added(flat[skipped]).to(f.dtype)
        return (output.view_as(x), *extras) if extras else output.view_as(x)


def _pass_on(x: Tensor) -> Tensor:
    return x


def skippable(module: nn.Module) -> SkippableFFN | None:
    """What runs in the place of an FFN; None if no profile is on it."""
    owner = getattr(module.__dict__.get("forward"), "__self__", None)
    return owner if isinstance(owner, SkippableFFN) else None
