"""The passes over the text to fit to, and the sums that they leave: for the dense fit and for each refit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ffnskip.compensation.compensator import Compensator
from ffnskip.errors import FfnskipError
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Compensation
from ffnskip.profiles.weights import Weights
from ffnskip.rules.predicted_damage import PROBE, PROBE_BIAS
from ffnskip_cli.calibration.fit.gradients import Gradients, take_gradients
from ffnskip_cli.calibration.fit.least_squares import (
    Features,
    NeuronChoice,
    NormalEquations,
    best_ridge,
    solve_map,
    with_one,
)
from ffnskip_cli.calibration.fit.trial import Cost, HeldBack, Seen, observe, trial
from ffnskip_cli.calibration.lab import Lab

HELD_BACK = 12  # sequences on which a refit must prove itself
_LEAST = 3  # sequences to fit to
GRADIENT_TOKENS = 24576  # at most, and at most half of the text: a backward pass costs as much as three others
CHOICE_SEQUENCES = 16  # that neurons are chosen on
DENSE_PART, PROBE_PART, REFIT_PART = 1 / 3, 1 / 8, 1 / 3  # of the text
WARM_UP = 16  # positions of each sequence that nothing is fitted to: the first tokens are unlike all others
DECAY = 0.7  # of what earlier passes count when a refit adds another
DENSE_WEIGHT = 0.3  # of a token of the dense model beside one that was skipped
SENSITIVITY = 0.5  # exponent: the probe of a token's own sensitivity is unsure enough that half of it serves best
PROBE_RIDGE = 1e-3
_TINY = 1e-12  # nats


def gradient_sequences(sequences: int, length: int) -> int:
    """How many of this many sequences gradients are taken of."""
    return max(1, min(GRADIENT_TOKENS // length, sequences // 2))


def refuse_too_little(text: Tensor) -> None:
    """Raise FfnskipError if ``text [sequences, length]`` cannot be shared out among the steps of a fit."""
    if len(text) < _LEAST:
        raise FfnskipError(
            f"{text.numel()} tokens are too few to fit to, which takes {_LEAST * text.shape[1]}: ask for more "
            "--fit-tokens, with --dataset self for more --tokens, or name a longer text."
        )


def share(part: float, sequences: int) -> int:
    """How many sequences a part of this many is; at least two."""
    return max(2, round(part * sequences))


def stored(tensors: dict[str, Tensor]) -> Weights:
    """As they are written: bfloat16, but for the probes' biases, which are added in float32, and integers."""
    return Weights(
        {
            name: tensor.to(torch.bfloat16) if tensor.is_floating_point() and name != PROBE_BIAS else tensor
            for name, tensor in tensors.items()
        }
    )


@dataclass(frozen=True)
class FitTask:
    """What is to be fitted, and to what.

    Attributes:
        draft: rule, region and kind of compensation.
        text: to fit to, ``[sequences, length]``.
        held_back: ``[sequences, length]`` of other text, on which a refit must prove itself.
        ratio: the skip_ratio at which the loop is closed.
        seed: of the sampled labels.
    """

    draft: Profile
    text: Tensor
    held_back: Tensor
    ratio: float
    seed: int

    @property
    def sequences(self) -> Tensor:
        """Those of the text that gradients are taken of."""
        return self.text[: gradient_sequences(*self.text.shape)]


class Fitter:
    """Fits one draft's compensation and probes.

    Args:
        lab: with the dense model.
        task: what to fit.
        gradients: those that were taken for another draft with the same task.

    Attributes:
        ridge: the penalty that did best, once the dense fit is done.
        index: the neurons that run beside the map, ``[layers, neurons]``; None without.
    """

    def __init__(self, lab: Lab, task: FitTask, gradients: Gradients | None = None) -> None:
        refuse_too_little(task.text)
        skip = task.draft.skip
        warm_up = min(WARM_UP, task.text.shape[1] // 4)
        skip = skip.model_copy(update={"warm_up": warm_up, "refresh_every": None})
        sites = ffn_sites(lab.model)[skip.cold_s : skip.cold_e]
        self.ridge = 0.0
        self._lab, self._task, self._text = lab, task, task.text
        self._draft = task.draft.model_copy(update={"skip": skip})
        self.held_back = HeldBack(lab, task.held_back, task.ratio)
        compensation = task.draft.compensation
        self._subject = [skip.model_dump(), compensation.model_dump(), task.ratio, task.text.tolist(), task.seed]
        self.gradients = gradients or self._take_gradients()
        self.ffns = [site.ffn for site in sites]
        self.index = self._choose_neurons()
        self._features = [
            Features(compensation, ffn, None if self.index is None else self.index[layer])
            for layer, ffn in enumerate(self.ffns)
        ]
        self.sums = self._no_sums()

    def fit_dense(self) -> dict[str, Tensor]:
        """Weights fitted to the dense model's states: the map by least squares, then the probes to what it damages."""
        tensors = self._stage(0, self._fit_dense)
        self.ridge = self._lab.journal.remember(["ridge", self._subject], lambda: self.ridge)
        return tensors

    def refit(self, tensors: dict[str, Tensor], threshold: float, number: int) -> dict[str, Tensor]:
        """The same on the states of the model that skips with `tensors`: the map on what it skips, the probe on all."""
        return self._stage(number, partial(self._refit, tensors, threshold, number))

    def measure(self, tensors: dict[str, Tensor]) -> Cost:
        """What the weights cost on the text that is held back."""
        return self.held_back.measure(self._draft, stored(tensors).tensors)

    def like_draft(self, compensation: Compensation) -> Profile:
        """The draft as it is fitted, with another compensation."""
        return self._draft.model_copy(update={"compensation": compensation})

    def sum_up_dense(self) -> None:
        """Take the sums over the dense model's states, and the ridge that does best on an eighth of the sequences."""
        held_out, sequences = self._no_sums(), self._part(0.0, DENSE_PART)
        part = max(1, len(sequences) // 8)
        for sums, chunk in ((held_out, sequences[:part]), (self.sums, sequences[part:])):
            self.observe({}, None, chunk, partial(self._add, sums, all_tokens=True), "fitting to the dense model")
        ridge = best_ridge(self.sums, held_out)
        self.ridge = self._lab.journal.remember(["ridge", self._subject], lambda: ridge)
        self.sums.blend(held_out, 1.0)
        self.sums.scale(DENSE_WEIGHT)

    def _fit_dense(self) -> dict[str, Tensor]:
        self.sum_up_dense()
        tensors = self._solve()
        if not self._probing:
            return tensors
        damages = NormalEquations(len(self.ffns), self._hidden + 1, 1)
        self.observe(tensors, None, self.probe_text, partial(self._add_damage, damages), "fitting the probes")
        return tensors | self.probes(damages.solve(PROBE_RIDGE)[..., 0])

    def _refit(self, tensors: dict[str, Tensor], threshold: float, number: int) -> dict[str, Tensor]:
        new, damages = self._no_sums(), NormalEquations(len(self.ffns), self._hidden + 1, 1)

        def see(seen: Seen) -> None:
            self._add(new, seen, all_tokens=False)
            if self._probing:
                self._add_damage(damages, seen)

        start = DENSE_PART + PROBE_PART + (number - 1) * REFIT_PART
        self.observe(tensors, threshold, self._part(start, REFIT_PART), see, f"refit {number}")
        new.blend(self.sums, DECAY)
        self.sums = new
        return self._solve() | (self.probes(damages.solve(PROBE_RIDGE)[..., 0]) if self._probing else {})

    def _stage(self, number: int, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Weights of a stage, 0 for the dense fit. Of the sums, which are large, only the latest stage's are kept."""

        def finish() -> dict[str, Tensor]:
            if number > 0:
                self._restore(self._lab.journal.remember_tensors(self._key("sums", number - 1), self._state))
            tensors = compute()
            self._lab.journal.remember_tensors(self._key("sums", number), self._state)
            return tensors

        tensors = self._lab.journal.remember_tensors(self._key("weights", number), finish)
        self._lab.journal.forget_tensors(self._key("sums", number - 1))
        return tensors

    def _key(self, what: str, number: int) -> list[object]:
        return [what, number, self._subject]

    def _state(self) -> dict[str, Tensor]:
        return dict(vars(self.sums))

    def _restore(self, state: dict[str, Tensor]) -> None:
        for name in vars(self.sums):
            setattr(self.sums, name, state[name])

    @property
    def probe_text(self) -> Tensor:
        """``[sequences, length]`` for the first fit of the probes."""
        return self._part(DENSE_PART, PROBE_PART)

    @property
    def _probing(self) -> bool:
        return self._draft.skip.by.reads == "input"

    @property
    def _hidden(self) -> int:
        return self._draft.model.hidden_size

    def _take_gradients(self) -> Gradients:
        first, sequences, seed = self._draft.skip.warm_up, self._task.sequences, self._task.seed
        tensors = self._lab.journal.remember_tensors(
            ["gradients", sequences.tolist(), first, seed],
            lambda: vars(take_gradients(self._lab, sequences, first, seed)),
        )
        region = slice(self._draft.skip.cold_s, self._draft.skip.cold_e)
        return Gradients(tensors["fisher"][region], tensors["sensitivity"][region])

    def _choose_neurons(self) -> Tensor | None:
        if (count := self._draft.compensation.neurons) == 0:
            return None

        def choose() -> dict[str, Tensor]:
            choice = NeuronChoice(self.ffns, self._hidden)
            sample = self._text[-CHOICE_SEQUENCES:]
            self.observe({}, None, sample, lambda seen: choice.add(seen.place, seen.x), "choosing neurons")
            return {"index": choice.choose(count, self.gradients.fisher)}

        return self._lab.journal.remember_tensors(["neurons", self._subject], choose)["index"]

    def _no_sums(self) -> NormalEquations:
        features = self._features[0].count(self._hidden)
        return NormalEquations(len(self.ffns), features, self._hidden)

    def _part(self, start: float, part: float) -> Tensor:
        """A part of the text; behind its end it begins anew."""
        places = torch.arange(share(part, len(self._text))) + round(start * len(self._text))
        return self._text[places % len(self._text)]

    def _add(self, sums: NormalEquations, seen: Seen, *, all_tokens: bool) -> None:
        rows = slice(None) if all_tokens else seen.skipped
        if len(x := seen.x[rows]):
            sums.add(seen.place, self._features[seen.place](x), seen.f[rows].float())

    def _add_damage(self, damages: NormalEquations, seen: Seen) -> None:
        damages.add(seen.place, with_one(seen.x), self.log_damage(seen, seen.compensator))

    def log_damage(self, seen: Seen, compensator: Compensator) -> Tensor:
        """What adding ``g`` would cost each token, skipped or not: log of ``½ eᵀ F e`` nats, ``[n, 1]``."""
        fisher = self.gradients.fisher[seen.place].to(seen.x.device)
        error = seen.f.float() - compensator.added(seen.x).float()
        damage = 0.5 * ((error @ fisher) * error).sum(dim=1, keepdim=True)
        return damage.clamp(min=_TINY).log()

    def _solve(self) -> dict[str, Tensor]:
        return solve_map(self.sums, self.ridge, self._draft.compensation, self.index)

    def probes(self, log_damage: Tensor) -> dict[str, Tensor]:
        """The probes' weights from a fit of the log damage, ``[layers, hidden + 1]``, plus a token's sensitivity."""
        probe = log_damage.float() + SENSITIVITY * self.gradients.sensitivity
        return {PROBE: probe[:, :-1].contiguous(), PROBE_BIAS: probe[:, -1].contiguous()}

    def observe(
        self,
        tensors: dict[str, Tensor],
        threshold: float | None,
        sequences: Tensor,
        see: Callable[[Seen], None],
        what: str,
    ) -> None:
        """Run part of the text with the draft and these weights; without a threshold, as the dense model."""
        observe(self._lab, trial(self._draft, tensors, threshold), sequences, see, what)
