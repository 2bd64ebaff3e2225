"""Fit compensation and probe: to the dense model first, then to the states that the skipping model produces.

Where nobody said how large the compensation is, it is the usual size, or with `--compensate auto` what saves most: a
larger one does less harm per skipped FFN, so that more can be skipped for the same KL, but each skip saves less. Every
candidate is fitted to the dense model, all from the same sums; its cost on the text that is held back says how much it
could skip within the budget, and the one that then saves most FLOPs, its own charged, is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.compensation.compensator import Compensator
from ffnskip.compensation.kinds import KINDS
from ffnskip.errors import FfnskipError, ProfileError
from ffnskip.model.neurons import count_neurons
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.evidence import Fit, TriedCompensation
from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Compensation
from ffnskip_cli.budget import MAX_KL
from ffnskip_cli.calibration.fit.fitter import (
    CHOICE_SEQUENCES,
    DENSE_PART,
    HELD_BACK,
    PROBE_PART,
    PROBE_RIDGE,
    REFIT_PART,
    FitTask,
    Fitter,
    gradient_sequences,
    share,
    stored,
)
from ffnskip_cli.calibration.fit.gradients import Gradients
from ffnskip_cli.calibration.fit.least_squares import NormalEquations, solve_map, with_one
from ffnskip_cli.calibration.fit.trial import Seen, trial
from ffnskip_cli.calibration.lab import Lab, Sizes, Step
from ffnskip_cli.calibration.settings import Settings
from ffnskip_cli.measure.flops import model_cost, overhead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnskip_cli.text.corpus import Corpus

MAX_REFITS = 4
GAIN = 0.01  # that a refit must bring, or it was the last
USUAL_RATIO = 0.25  # where the loop is closed if only limits on quality are asked for
BACKWARD = 3  # forward passes that a forward and backward pass costs
_MEASURED = 4  # passes that measuring a fit takes of a sequence: its scores, the dense model, and two thresholds
_RANK, _RANK_ALONE = 1 / 6, 1 / 3  # of the stream's width, with neurons and without
_NEURONS = 1 / 6  # of the FFN's
_EVEN = 16  # neurons come in such groups, which matrix products like
MOST_CANDIDATES = 7


@dataclass(frozen=True)
class FitStage:
    """Give the draft of a rule the compensation that the settings ask for, and the probes that the rule needs."""

    settings: Settings

    @property
    def ratio(self) -> float:
        """Where the loop is closed: in the middle of the ratios that are asked for."""
        ratios = sorted(goal.value for goal in self.settings.goals if goal.kind == "target_ratio")
        return ratios[len(ratios) // 2] if ratios else USUAL_RATIO

    def run(self, lab: Lab, draft: Profile, text: Corpus | None, recorded: Tensor) -> Profile:
        """Fit to `text`; the first of the sequences `recorded`, ``[n, length]``, are what the fit proves itself on."""
        if not self.settings.fits:
            return draft
        assert text is not None, "there is no text to fit to"
        task = FitTask(draft, text.tokens, recorded[:HELD_BACK], self.ratio, self.settings.seed)
        tried: tuple[TriedCompensation, ...] = ()
        gradients = None
        if self.settings.compensate == "auto":
            budget = max((goal.value for goal in self.settings.goals if goal.kind == "max_kl"), default=MAX_KL)
            compensation, tried, gradients = choose_compensation(lab, task, budget)
        else:
            compensation = compensation_of(lab.model, self.settings)
        task = replace(task, draft=draft.model_copy(update={"compensation": compensation}))
        return fit_weights(lab, task, text.text_sha256, tried, gradients)

    def cost(self, sizes: Sizes) -> list[Step]:
        """The passes of a fit, for as much text as was asked for."""
        if not self.settings.fits:
            return []
        kind, neurons = self.settings.compensate, self.settings.neurons
        dense, probes, refit = (share(part, sizes.fit) for part in (DENSE_PART, PROBE_PART, REFIT_PART))
        separable = kind == "auto" or KINDS[kind].reads_input
        choosing = min(sizes.fit, CHOICE_SEQUENCES) if separable and neurons != 0 else 0
        fitting = dense + probes * self.settings.probes
        measuring = _MEASURED * min(HELD_BACK, sizes.recorded)
        steps = [Step("take gradients", BACKWARD * gradient_sequences(sizes.fit, sizes.length))]
        if kind == "auto":
            passes = choosing + fitting + MOST_CANDIDATES * 2 * measuring
            steps.append(Step(f"compare up to {MOST_CANDIDATES} compensations", passes))
        if choosing:
            steps.append(Step("choose neurons", choosing))
        return [
            *steps,
            Step("fit to the dense model", fitting),
            Step(f"refit up to {MAX_REFITS} times", MAX_REFITS * refit),
            Step("measure the fits", (1 + MAX_REFITS) * measuring),
        ]


def fit_weights(
    lab: Lab,
    task: FitTask,
    text_sha256: str,
    tried: tuple[TriedCompensation, ...] = (),
    gradients: Gradients | None = None,
) -> Profile:
    """The draft with fitted weights, a threshold to start from, and what the fit went through.

    Args:
        lab: with the dense model.
        task: what to fit to what.
        text_sha256: hash of the text that is fitted to.
        tried: the compensations that the draft's was chosen from.
        gradients: those that were taken for that choice.
    """
    fitter = Fitter(lab, task, gradients)
    best = tensors = fitter.fit_dense()
    best_cost = cost = fitter.measure(tensors)
    history = [cost.kl]
    for number in range(1, MAX_REFITS + 1):
        tensors = fitter.refit(tensors, cost.threshold, number)
        cost = fitter.measure(tensors)
        history.append(cost.kl)
        gained = 1 - cost.kl / best_cost.kl
        if gained > 0:
            best, best_cost = tensors, cost
        if gained < GAIN:
            break
    evidence = Fit(
        tokens=task.text.numel(),
        text_sha256=text_sha256,
        gradient_tokens=task.sequences.numel(),
        ridge=fitter.ridge,
        ratio=round(best_cost.ratio, 6),
        kl=tuple(float(f"{value:.4g}") for value in history),
        tried=tried,
    )
    try:
        fitted = task.draft.with_threshold(best_cost.threshold).with_weights(stored(best))
    except ProfileError:
        raise FfnskipError("The fit gave numbers that are not finite: try another --dtype, such as float32.") from None
    return fitted.model_copy(update={"fit": evidence})


def compensation_of(model: PreTrainedModel, settings: Settings) -> Compensation:
    """The kind and size that the settings ask for, and the usual size where they leave it open.

    Raises:
        FfnskipError: the model's FFNs have no such neurons, or the rank is more than the stream is wide.
    """
    kind = KINDS[settings.compensate]
    if not kind.reads_input:
        return Compensation.model_validate({"kind": kind.name})
    hidden = model.config.get_text_config().hidden_size
    available = min(count_neurons(site.ffn) for site in ffn_sites(model))
    neurons = usual_neurons(available) if settings.neurons is None else settings.neurons
    if neurons > available:
        raise FfnskipError(
            f"--neurons {neurons} is more than the {available} that each FFN of this model has."
            if available
            else "The FFNs of this model have no neurons that can be run alone: leave --neurons out."
        )
    if not kind.has_rank:
        return Compensation(kind="linear", neurons=neurons)
    rank = settings.rank or max(1, round(hidden * (_RANK if neurons else _RANK_ALONE)))
    if rank > hidden:
        raise FfnskipError(f"--rank {rank} is more than the width of the model's stream, {hidden}.")
    return Compensation(kind="low-rank", rank=rank, neurons=neurons)


def usual_neurons(available: int) -> int:
    """How many neurons are run where nobody said, of so many that can be."""
    groups = -(-round(available * _NEURONS) // _EVEN)
    return min(available, groups * _EVEN)


def candidates(model: PreTrainedModel) -> list[Compensation]:
    """From next to nothing to a whole linear map with neurons, in rising size."""
    hidden = model.config.get_text_config().hidden_size
    most = usual_neurons(min(count_neurons(site.ffn) for site in ffn_sites(model)))
    sizes = [(hidden // 12, 0), (hidden // 12, most // 2), (hidden // 6, most // 2), (hidden // 6, most)]
    thin = [Compensation(kind="low-rank", rank=max(1, rank), neurons=neurons) for rank, neurons in sizes]
    whole = [Compensation(kind="linear", neurons=neurons) for neurons in (0, most)]
    distinct = {one.model_dump_json(): one for one in (Compensation(kind="mean"), *thin, *whole)}
    return list(distinct.values())


def choose_compensation(
    lab: Lab, task: FitTask, budget: float
) -> tuple[Compensation, tuple[TriedCompensation, ...], Gradients]:
    """The candidate that saves most FLOPs at a KL of `budget` nats per token, what each would save, and the gradients.

    The draft of the `task` has no compensation yet.
    """
    draft, tried = task.draft, candidates(lab.model)
    fitter = Fitter(lab, replace(task, draft=draft.model_copy(update={"compensation": tried[-1]})))
    fitter.sum_up_dense()
    fits = [_fit(fitter, one) for one in tried]
    if draft.skip.by.reads == "input":
        fits = _with_probes(fitter, tried, fits)
    cost, n_layers = model_cost(lab.model), draft.model.n_layers
    found = []
    for one, tensors in zip(tried, fits, strict=True):
        profile = draft.model_copy(update={"compensation": one})
        reached = fitter.held_back.ratio_within(budget, fitter.like_draft(one), stored(tensors).tensors)
        added = overhead(profile, lab.model)
        probed = profile.skip.cold_e - profile.skip.cold_s
        net = reached * n_layers * (cost.ffn_flops - added.added_flops) - probed * added.check_flops
        saved = net / (n_layers * cost.ffn_flops + cost.other_flops)
        found.append(
            TriedCompensation(
                **one.model_dump(include={"kind", "rank", "neurons"}),
                skip_ratio=float(f"{reached:.4g}"),
                flops_saved=float(f"{saved:.4g}"),
            )
        )
    best = max(range(len(found)), key=lambda place: found[place].flops_saved)
    return tried[best], tuple(found), fitter.gradients


def _fit(fitter: Fitter, one: Compensation) -> dict[str, Tensor]:
    """The map of one candidate, from the sums of all features."""
    features, hidden = fitter.sums.gram.shape[1], fitter.sums.cross.shape[2]
    of_x = [] if one.kind == "mean" else list(range(hidden))
    chosen = torch.tensor([*of_x, *range(hidden, hidden + one.neurons), features - 1])
    index = fitter.index[:, : one.neurons] if fitter.index is not None and one.neurons else None
    return solve_map(fitter.sums.select(chosen), fitter.ridge, one, index)


def _with_probes(fitter: Fitter, tried: list[Compensation], fits: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The maps with probes for the damage that each does, in one pass."""
    layers, features = len(fitter.ffns), fitter.sums.cross.shape[2] + 1
    damages = NormalEquations(layers, features, len(fits))
    profiles = [
        trial(fitter.like_draft(one), stored(tensors).tensors) for one, tensors in zip(tried, fits, strict=True)
    ]
    compensators = [[Compensator(profile, place, ffn) for profile in profiles] for place, ffn in enumerate(fitter.ffns)]

    def see(seen: Seen) -> None:
        columns = [fitter.log_damage(seen, compensator) for compensator in compensators[seen.place]]
        damages.add(seen.place, with_one(seen.x), torch.cat(columns, dim=1))

    fitter.observe({}, None, fitter.probe_text, see, "fitting the probes")
    solved = damages.solve(PROBE_RIDGE)
    return [tensors | fitter.probes(solved[..., place]) for place, tensors in enumerate(fits)]
