"""Fit compensation and probe: to the dense model first, then to the states that the skipping model produces."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.compensation import PROBE, PROBE_BIAS, Weights
from ffnskip.layers import ffn_sites
from ffnskip.profile import Profile
from ffnskip.sections import Fit
from ffnskip_cli.calibration.corpus import Corpus
from ffnskip_cli.calibration.fit.gradients import Gradients, take_gradients, with_one
from ffnskip_cli.calibration.fit.held_back import HeldBack, trial
from ffnskip_cli.calibration.fit.loop import Seen, run
from ffnskip_cli.calibration.fit.maps import Features, NeuronChoice, solve_map
from ffnskip_cli.calibration.fit.normal import NormalEquations, best_ridge
from ffnskip_cli.journal import Journal
from ffnskip_cli.track import Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_REFITS = 4
HELD_BACK = 12  # sequences on which a refit must prove itself; nothing is fitted to them
GRADIENT_TOKENS = 24576
CHOICE_SEQUENCES = 16  # that neurons are chosen on
DENSE_PART, PROBE_PART, REFIT_PART = 1 / 3, 1 / 8, 1 / 3  # of the text
WARM_UP = 16  # positions of each sequence that nothing is fitted to: the first tokens are unlike all others
DECAY = 0.7  # of what earlier passes count when a refit adds another
DENSE_WEIGHT = 0.3  # of a token of the dense model beside one that was skipped
SENSITIVITY = 0.5  # exponent: the probe of a token's own sensitivity is unsure enough that half of it serves best
PROBE_RIDGE = 1e-3
GAIN = 0.01  # that a refit must bring, or it was the last
_TINY = 1e-12  # nats


def fit_weights(
    model: PreTrainedModel, draft: Profile, text: Corpus, ratio: float, seed: int, track: Track, journal: Journal
) -> Profile:
    """The draft with fitted weights, a threshold to start from, and what the fit went through.

    Args:
        model: the dense model.
        draft: rule, region and kind of compensation.
        text: to fit to; its last few sequences are held back to see when refits stop helping.
        ratio: the skip_ratio at which the loop is closed.
        seed: of the sampled labels.
        track: shows progress.
        journal: remembers finished stages.
    """
    fitter = _Fitter(model, draft, text.tokens, ratio, seed, track, journal)
    best = tensors = fitter.fit_dense()
    threshold, kl = fitter.held_back.solve(best)
    start, history = threshold, [kl]
    for number in range(1, MAX_REFITS + 1):
        tensors = fitter.refit(tensors, threshold, number)
        threshold, kl = fitter.held_back.solve(tensors)
        history.append(kl)
        if kl > min(history[:-1]) * (1 - GAIN):
            break
        best, start = tensors, threshold
    evidence = Fit(
        tokens=text.tokens_used,
        text_sha256=text.text_sha256,
        gradient_tokens=fitter.gradient_sequences.numel(),
        ridge=fitter.ridge,
        ratio=round(ratio, 6),
        kl=tuple(float(f"{value:.4g}") for value in history),
    )
    fitted = draft.with_threshold(start).with_weights(stored(best))
    return fitted.model_copy(update={"fit": evidence})


def stored(tensors: dict[str, Tensor]) -> Weights:
    """As they are written: bfloat16, but for the probes' biases, which are added in float32, and integers."""
    return Weights(
        {
            name: tensor.to(torch.bfloat16) if tensor.is_floating_point() and name != PROBE_BIAS else tensor
            for name, tensor in tensors.items()
        }
    )


class _Fitter:
    """The passes over the text, and the sums that they leave."""

    def __init__(
        self,
        model: PreTrainedModel,
        draft: Profile,
        text: Tensor,
        ratio: float,
        seed: int,
        track: Track,
        journal: Journal,
    ) -> None:
        held_back = min(HELD_BACK, max(2, len(text) // 8))
        skip = draft.skip.model_copy(update={"warm_up": min(WARM_UP, text.shape[1] // 4), "refresh_every": None})
        sites = ffn_sites(model)[skip.cold_s : skip.cold_e]
        self.ridge = 0.0
        self._model, self._track, self._journal = model, track, journal
        self._draft = draft.model_copy(update={"skip": skip})
        self.held_back = HeldBack(model, self._draft, text[-held_back:], ratio, track, journal)
        self._text = text[:-held_back]
        self._cursor = 0
        self.gradient_sequences = self._text[: max(1, GRADIENT_TOKENS // text.shape[1])]
        self._gradients = self._take_gradients(seed)
        self._scales = [site.scale for site in sites]
        self._ffns = [site.layer.get_submodule("mlp") for site in sites]
        self._index = self._choose_neurons()
        self._features = [
            Features(draft.compensation, ffn, None if self._index is None else self._index[place])
            for place, ffn in enumerate(self._ffns)
        ]
        self._sums = self._no_sums()

    def fit_dense(self) -> dict[str, Tensor]:
        """Least squares on the dense model's states, with the ridge that did best on one sequence in eight of them."""
        held_out, sequences = self._no_sums(), self._next(DENSE_PART)
        part = max(1, len(sequences) // 8)
        for sums, chunk in ((held_out, sequences[:part]), (self._sums, sequences[part:])):
            self._run({}, None, chunk, partial(self._add, sums, all_tokens=True), "fitting to the dense model")
        self.ridge = best_ridge(self._sums, held_out)
        held_out.blend(self._sums, 1.0)
        self._sums = self._no_sums()
        self._sums.blend(held_out, DENSE_WEIGHT)
        tensors = self._solve()
        if self._draft.skip.rule != "predicted-damage":
            return tensors
        damages = NormalEquations(len(self._ffns), self._hidden + 1, 1)
        self._run(tensors, None, self._next(PROBE_PART), partial(self._add_damage, damages), "fitting the probes")
        return tensors | self._probe(damages)

    def refit(self, tensors: dict[str, Tensor], threshold: float, number: int) -> dict[str, Tensor]:
        """The same on the states of the model that skips with `tensors`: the map on what it skips, the probe on all."""
        new, damages = self._no_sums(), NormalEquations(len(self._ffns), self._hidden + 1, 1)
        probing = self._draft.skip.rule == "predicted-damage"

        def see(seen: Seen) -> None:
            self._add(new, seen, all_tokens=False)
            if probing:
                self._add_damage(damages, seen)

        self._run(tensors, threshold, self._next(REFIT_PART), see, f"refit {number}")
        new.blend(self._sums, DECAY)
        self._sums = new
        return self._solve() | (self._probe(damages) if probing else {})

    @property
    def _hidden(self) -> int:
        return self._draft.model.hidden_size

    def _take_gradients(self, seed: int) -> Gradients:
        first, sequences = self._draft.skip.warm_up, self.gradient_sequences
        tensors = self._journal.remember_tensors(
            ["gradients", sequences.tolist(), first, seed],
            lambda: vars(take_gradients(self._model, sequences, first, seed, self._track)),
        )
        region = slice(self._draft.skip.cold_s, self._draft.skip.cold_e)
        return Gradients(tensors["fisher"][region], tensors["sensitivity"][region])

    def _choose_neurons(self) -> Tensor | None:
        if (count := self._draft.compensation.neurons) == 0:
            return None
        choice = NeuronChoice(self._ffns, self._hidden)
        sample = self._text[-CHOICE_SEQUENCES:]
        self._run({}, None, sample, lambda seen: choice.add(seen.place, seen.x), "choosing neurons")
        return choice.choose(count, self._gradients.fisher)

    def _no_sums(self) -> NormalEquations:
        features = self._features[0].count(self._hidden)
        return NormalEquations(len(self._ffns), features, self._hidden)

    def _next(self, part: float) -> Tensor:
        """The next part of the text; behind its end it begins anew."""
        count = max(2, round(part * len(self._text)))
        places = (torch.arange(count) + self._cursor) % len(self._text)
        self._cursor += count
        return self._text[places]

    def _add(self, sums: NormalEquations, seen: Seen, *, all_tokens: bool) -> None:
        rows = slice(None) if all_tokens else seen.skipped
        if len(x := seen.x[rows]):
            sums.add(seen.place, self._features[seen.place](x), seen.f[rows].float())

    def _add_damage(self, damages: NormalEquations, seen: Seen) -> None:
        """The damage of adding ``g`` would be ``½ eᵀ F e`` nats, whether the token is skipped or not."""
        fisher = self._gradients.fisher[seen.place].to(seen.x.device)
        error = (seen.f.float() - seen.compensator.added(seen.x).float()) * self._scales[seen.place]
        damage = 0.5 * ((error @ fisher) * error).sum(dim=1, keepdim=True)
        damages.add(seen.place, with_one(seen.x), damage.clamp(min=_TINY).log())

    def _solve(self) -> dict[str, Tensor]:
        return solve_map(self._sums, self.ridge, self._draft.compensation, self._index)

    def _probe(self, damages: NormalEquations) -> dict[str, Tensor]:
        probe = damages.solve(PROBE_RIDGE)[..., 0].float() + SENSITIVITY * self._gradients.sensitivity
        return {PROBE: probe[:, :-1], PROBE_BIAS: probe[:, -1]}

    def _run(
        self,
        tensors: dict[str, Tensor],
        threshold: float | None,
        sequences: Tensor,
        see: Callable[[Seen], None],
        what: str,
    ) -> None:
        run(self._model, trial(self._draft, tensors, threshold), sequences, see, self._track, what)
