"""The state of one forward pass: which tokens may skip, which are skipping, and what has been counted."""

from threading import Lock, local
from typing import Any, Literal

import torch
from torch import Tensor

from ffnskip.errors import UnsupportedModelError
from ffnskip.model.parts import FFN_ROLES, Part
from ffnskip.profiles.schema import Skip
from ffnskip.rules import Rule, may_skip
from ffnskip.stats import SkipStats

Mode = Literal["decode", "score"]


class _Pass:
    """One forward pass over ``N = batch x sequence`` tokens, flattened.

    Attributes:
        allowed: ``[N]`` bool, the tokens that the rule applies to.
        past: ``[N]`` bool, those past their warm-up.
        turn: the rule's decisions.
        stats: what is counted, until the pass has ended.
        scratch: what the parts of the model keep until then, each under a key of its own.
    """

    def __init__(self, skip: Skip, rule: Rule, past: Tensor, allowed: Tensor, stats: SkipStats) -> None:
        self.allowed, self.past = allowed, past
        self.n_allowed = int(allowed.sum())
        self.turn = rule.turn(skip, allowed)
        self.stats = stats
        self.scratch: dict[Any, Any] = {}
        self.ever = torch.zeros_like(past)
        self.left_out = torch.zeros(len(past), dtype=torch.float64, device=past.device)  # in whole FFNs

    def move(self, device: torch.device) -> None:
        """Follow the hidden states when the layers of a model lie on several devices."""
        if self.allowed.device != device:
            self.turn.to(device)
            for name in ("allowed", "past", "ever", "left_out"):
                setattr(self, name, getattr(self, name).to(device))


class Walk:
    """Walks each forward pass's tokens through the skip region; shared by all wrapped FFNs of a model.

    In `decode` mode a prompt runs dense and generated tokens may skip (`ffnskip.general.sequences` tells them apart).
    In `score` mode every position counts as generated, so that one full forward exercises the rule. Several threads may
    run the model at once: a pass is its thread's own.

    Args:
        skip: the settings.
        mode: see above.
        stats: what is counted is added to these.
        rule: decides in place of the settings' own.

    Attributes:
        dense_layers: those whose FFN runs, whatever the rule decides; it still sees what they do.
        prompt_tokens: tokens so far that were prompt.
        generated_tokens: those that were generated, or were scored as if they had been.
        allowed_tokens: those of them that the rule applied to.
    """

    def __init__(self, skip: Skip, mode: Mode, stats: SkipStats, rule: Rule | None = None) -> None:
        self.skip = skip
        self.rule = rule or skip.by
        self.mode: Mode = mode
        self.stats = stats
        self.dense_layers: frozenset[int] = frozenset()
        self.prompt_tokens = self.generated_tokens = self.allowed_tokens = 0
        self._looked_at = self.rule.looks_at(skip.cold_s, skip.cold_e)
        self._lock = Lock()
        self._local = local()

    @property
    def active(self) -> bool:
        """Whether a pass is under way in which some token may skip."""
        return getattr(self._local, "current", None) is not None

    @property
    def scratch(self) -> dict[Any, Any]:
        """What the parts of the model keep during the pass."""
        return self._pass.scratch if self.active else {}

    @property
    def _pass(self) -> _Pass:
        current = getattr(self._local, "current", None)
        assert isinstance(current, _Pass), "no pass is under way"
        return current

    def begin(self, index: Tensor | None, mask: Tensor | None, tokens: int) -> None:
        """Start a forward pass.

        Args:
            index: ``[batch, sequence]`` integers, how many generated tokens came before each, negative in a prompt; in
                score mode the positions. None for nothing but prompt.
            mask: ``[batch, sequence]`` bool, False on padding; None where there is none.
            tokens: how many there are, ``batch x sequence``.
        """
        self._local.current = None
        past, allowed, stats = self.admit(index, mask, tokens)
        if bool(allowed.any()):
            self._local.current = _Pass(self.skip, self.rule, past.flatten(), allowed.flatten(), stats)
            return
        stats.never_skipped = stats.tokens  # the others are prompt, within their warm-up, or run dense to refresh
        stats.least = 0.0 if stats.tokens and self.rule.leaves_out_parts else 1.0
        self.count(stats)

    def admit(self, index: Tensor | None, mask: Tensor | None, tokens: int) -> tuple[Tensor, Tensor, SkipStats]:
        """Which tokens of a pass may skip; arguments as in `begin`.

        Returns:
            ``[batch, sequence]`` bool, the tokens past their warm-up; of the same shape, those of them that the rule
            applies to; and how many there are, to be counted when the pass is over.
        """
        if index is None:
            with self._lock:
                self.prompt_tokens += tokens if mask is None else int(mask.sum())
            none = torch.zeros(1, tokens, dtype=torch.bool)
            return none, none, SkipStats(self.stats.n_layers)
        real = torch.ones_like(index, dtype=torch.bool) if mask is None else mask
        generated = real & (index >= 0)
        past = generated & (index >= self.skip.warm_up)
        allowed = may_skip(index, self.skip) & past
        n_generated, n_past, n_allowed = int(generated.sum()), int(past.sum()), int(allowed.sum())
        with self._lock:
            self.prompt_tokens += int(real.sum()) - n_generated
            self.generated_tokens += n_generated
            self.allowed_tokens += n_allowed
        return past, allowed, SkipStats(self.stats.n_layers, tokens=n_past, warm_up_tokens=n_generated - n_past)

    def count(self, stats: SkipStats) -> None:
        """Add what a pass has counted."""
        with self._lock:
            self.stats.add(stats)

    def why_idle(self) -> str | None:
        """One sentence on why no token so far was allowed to skip; None if one was."""
        if self.allowed_tokens:
            return None
        if self.generated_tokens:
            refresh = "" if self.skip.refresh_every is None else ", or runs dense to refresh"
            why = f"each of {self.generated_tokens} was within its sequence's warm-up of {self.skip.warm_up}{refresh}"
        elif self.prompt_tokens:
            why = (
                f"all {self.prompt_tokens} were prompt, which runs dense in decode mode: texts are scored with "
                'mode="score"'
            )
        else:
            why = "the model was not run"
        return f"The profile did nothing: no token was allowed to skip, as {why}."

    def __reduce__(self) -> tuple[Any, ...]:
        return Walk, (self.skip, self.mode, self.stats, self.rule)  # a copy of the model has passes of its own

    def skipping(self, layer: int, x: Tensor, value: Tensor | None) -> tuple[Tensor, int]:
        """Which tokens skip this layer's FFN, ``[N]`` bool, and how many; they count as skipped from now on.

        Args:
            layer: whose FFN it is.
            x: the FFN's input, ``[N, hidden]``.
            value: what the rule reads from it, ``[N]``; None for a rule that does not.

        Raises:
            UnsupportedModelError: the FFN sees other tokens than the model was given.
        """
        now = self._pass
        now.move(x.device)
        if len(x) != len(now.allowed):
            raise UnsupportedModelError(
                f"The FFN of layer {layer} sees {len(x)} tokens where the model was given {len(now.allowed)}."
            )
        skipping = now.turn.skipping(layer, value)
        if layer in self.dense_layers:
            skipping = torch.zeros_like(skipping)
        if self.rule.reads == "input" and layer in self._looked_at:
            now.stats.checked[layer] += now.n_allowed
        n_skipping = int(skipping.sum())
        if n_skipping:
            now.stats.skipped[layer] += n_skipping
            now.stats.first_skipped[layer] += int((skipping & ~now.ever).sum())
            now.ever |= skipping
        return skipping, n_skipping

    def observe(self, layer: int, h: Tensor, f: Tensor, rows: Tensor | None) -> None:
        """Show the rule what the FFNs that ran did.

        Args:
            layer: whose FFN it was.
            h: residual stream entering the FFN, ``[n, hidden]``.
            f: what the FFN adds, ``[n, hidden]``.
            rows: ``[n]`` indices of the n tokens among the N of the pass; None when all ran.
        """
        if self.rule.reads != "output" or layer not in self._looked_at:
            return
        now = self._pass
        value, ran = self.rule.measure(h, f), torch.ones_like(now.allowed)
        if rows is not None:
            of_rows, value = value, value.new_zeros(len(now.allowed))
            value[rows], ran = of_rows, torch.zeros_like(ran)
            ran[rows] = True
        now.stats.checked[layer] += int((now.allowed & ran).sum())
        now.turn.observe(layer, value, ran)

    def allowed(self, device: torch.device) -> Tensor:
        """Which tokens of this pass the rule applies to, ``[N]`` bool."""
        self._pass.move(device)
        return self._pass.allowed

    def leave_out(self, layer: int, part: Part, counts: Tensor, share: float) -> None:
        """Count parts that are left out.

        Args:
            layer: whose parts they are.
            part: of which role.
            counts: ``[N]``, how many each token leaves out.
            share: what all parts of this role are of the FFN's FLOPs; 0 for attention's.
        """
        now = self._pass
        left_out = counts.double() * (share / part.width)
        now.left_out += left_out
        now.ever |= counts > 0
        now.stats.left_out[layer] += float(left_out.sum())
        if share == 0.0:
            now.stats.attention_flops += int(counts.sum()) * part.flops
        elif part.role == FFN_ROLES[0]:
            now.stats.checked[layer] += now.n_allowed

    def end(self) -> None:
        """Finish the forward pass."""
        if not self.active:
            return
        now, self._local.current = self._pass, None
        if self.rule.leaves_out_parts and bool(now.past.any()):
            now.stats.least = float(now.left_out[now.past].min()) / now.stats.n_layers
        now.stats.never_skipped += int((now.past & ~now.ever).sum())
        self.count(now.stats)
