"""The state of one forward pass: which tokens may skip, which are skipping, and what has been counted."""

from typing import Literal

import torch
from torch import Tensor

from ffnskip.model.parts import FFN_ROLES, Part
from ffnskip.profiles.schema import Skip
from ffnskip.rules import Rule, Turn, may_skip
from ffnskip.stats import SkipStats

Mode = Literal["decode", "score"]


class Walk:
    """Walks each forward pass's tokens through the skip region; shared by all wrapped FFNs of a model.

    Tokens are the ``N = batch x sequence`` positions of the pass, flattened. In `decode` mode a pass over several
    tokens, or the first pass over a sequence, is a prompt and runs dense; each later pass brings one generated token
    per row. In `score` mode every position counts as generated, so that one full forward exercises the rule.

    Args:
        skip: the settings.
        mode: see above.
        stats: what is counted is added to these.
        rule: decides in place of the settings' own.
    """

    def __init__(self, skip: Skip, mode: Mode, stats: SkipStats, rule: Rule | None = None) -> None:
        self.skip = skip
        self.rule = rule or skip.by
        self.mode: Mode = mode
        self.stats = stats
        self._looked_at = self.rule.looks_at(skip.cold_s, skip.cold_e)
        self._prompt_length: Tensor | None = None  # [batch]
        self._next: Tensor | None = None  # [batch], the positions that would go on with the same sequences
        self._clear()

    def _clear(self) -> None:
        self.active = False
        self._past = self._allowed = self._ever = self._left_out = torch.empty(0)
        self._turn: Turn | None = None
        self._n_allowed = 0

    def begin(self, position: Tensor, mask: Tensor | None) -> None:
        """Start a forward pass.

        Args:
            position: ``[batch, sequence]`` integers, the tokens' positions in their sequences.
            mask: ``[batch, sequence]`` bool, False on padding; None where there is none.
        """
        self._clear()
        index = self._generated_index(position)
        if index is None:
            return
        real = torch.ones_like(index, dtype=torch.bool) if mask is None else mask
        past = ((index >= self.skip.warm_up) & real).flatten()
        self.stats.tokens += (n_past := int(past.sum()))
        self.stats.warm_up_tokens += int(real.sum()) - n_past
        allowed = may_skip(index, self.skip).flatten() & past
        self._n_allowed = int(allowed.sum())
        if self._n_allowed == 0:  # all are within their warm-up, or run dense to refresh
            self.stats.never_skipped += n_past
            if n_past and self.rule.leaves_out_parts:
                self.stats.least = 0.0
            return
        self.active = True
        self._past, self._allowed = past, allowed
        self._turn = self.rule.turn(self.skip, allowed)
        self._ever = torch.zeros_like(past)
        self._left_out = torch.zeros(len(past), dtype=torch.float64, device=past.device)  # in whole FFNs

    def _generated_index(self, position: Tensor) -> Tensor | None:
        """``[batch, sequence]``: how many generated tokens came before each; None for a pass over a prompt."""
        if self.mode == "score":
            return position
        expected, self._next = self._next, position.amax(dim=1) + 1
        if position.shape[1] > 1 or not bool(position.any()):
            self._prompt_length = self._next
            return None
        if self._prompt_length is None or expected is None or not torch.equal(expected, position[:, 0]):
            self._prompt_length = position[:, 0]  # another sequence, whose prompt went through without the profile
        return position - self._prompt_length[:, None]

    def skipping(self, layer: int, device: torch.device, value: Tensor | None) -> tuple[Tensor, int]:
        """Which tokens skip this layer's FFN, ``[N]`` bool, and how many; they count as skipped from now on.

        Args:
            layer: whose FFN it is.
            device: where its hidden states are.
            value: what the rule reads from the FFN's input, ``[N]``; None for one that does not.
        """
        self._move(device)
        assert self._turn is not None, "no pass is under way"
        skipping = self._turn.skipping(layer, value)
        if self.rule.reads == "input" and layer in self._looked_at:
            self.stats.checked[layer] += self._n_allowed
        n_skipping = int(skipping.sum())
        if n_skipping:
            self.stats.skipped[layer] += n_skipping
            self.stats.first_skipped[layer] += int((skipping & ~self._ever).sum())
            self._ever |= skipping
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
        assert self._turn is not None, "no pass is under way"
        value, ran = self.rule.measure(h, f), torch.ones_like(self._allowed)
        if rows is not None:
            of_rows, value = value, value.new_zeros(len(self._allowed))
            value[rows], ran = of_rows, torch.zeros_like(ran)
            ran[rows] = True
        self.stats.checked[layer] += int((self._allowed & ran).sum())
        self._turn.observe(layer, value, ran)

    def allowed(self, device: torch.device) -> Tensor:
        """Which tokens of this pass the rule applies to, ``[N]`` bool."""
        self._move(device)
        return self._allowed

    def leave_out(self, layer: int, part: Part, counts: Tensor, share: float) -> None:
        """Count parts that are left out.

        Args:
            layer: whose parts they are.
            part: of which role.
            counts: ``[N]``, how many each token leaves out.
            share: what all parts of this role are of the FFN's FLOPs; 0 for attention's.
        """
        left_out = counts.double() * (share / part.width)
        self._left_out += left_out
        self._ever |= counts > 0
        self.stats.left_out[layer] += float(left_out.sum())
        if share == 0.0:
            self.stats.attention_flops += int(counts.sum()) * part.flops
        elif part.role == FFN_ROLES[0]:
            self.stats.checked[layer] += self._n_allowed

    def end(self) -> None:
        """Finish the forward pass."""
        if self.active:
            if self.rule.leaves_out_parts and bool(self._past.any()):
                self.stats.least = min(self.stats.least, float(self._left_out[self._past].min()) / self.stats.n_layers)
            self.stats.never_skipped += int((self._past & ~self._ever).sum())
        self._clear()

    def _move(self, device: torch.device) -> None:
        """Follow the hidden states when the layers of a model lie on several devices."""
        if self._turn is not None and self._allowed.device != device:
            self._turn.to(device)
            for name in ("_allowed", "_past", "_ever", "_left_out"):
                setattr(self, name, getattr(self, name).to(device))
