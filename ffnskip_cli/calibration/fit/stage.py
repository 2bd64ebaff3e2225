"""Fit compensation and probe: to the dense model first, then to the states that the skipping model produces."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ffnskip.compensation.kinds import KINDS
from ffnskip.errors import FfnskipError, ProfileError
from ffnskip.profiles.evidence import Fit, TriedCompensation
from ffnskip.profiles.profile import Profile
from ffnskip_cli.budget import MAX_KL
from ffnskip_cli.calibration.fit import fitter as parts
from ffnskip_cli.calibration.fit.auto import MOST_CANDIDATES, choose_compensation
from ffnskip_cli.calibration.fit.fitter import FitTask, Fitter, share, stored
from ffnskip_cli.calibration.fit.gradients import Gradients
from ffnskip_cli.calibration.fit.kinds import compensation_of
from ffnskip_cli.calibration.lab import Lab, Sizes, Step
from ffnskip_cli.calibration.settings import Settings
from ffnskip_cli.text.corpus import Corpus

MAX_REFITS = 4
GAIN = 0.01  # that a refit must bring, or it was the last
USUAL_RATIO = 0.25  # where the loop is closed if only limits on quality are asked for
BACKWARD = 3  # forward passes that a forward and backward pass costs
_MEASURED = 4  # passes that measuring a fit takes of a sequence: its scores, the dense model, and two thresholds


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
        task = FitTask(draft, text.tokens, recorded[: parts.HELD_BACK], self.ratio, self.settings.seed)
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
        dense, probes, refit = (
            share(part, sizes.fit) for part in (parts.DENSE_PART, parts.PROBE_PART, parts.REFIT_PART)
        )
        separable = kind == "auto" or KINDS[kind].reads_input
        choosing = min(sizes.fit, parts.CHOICE_SEQUENCES) if separable and neurons != 0 else 0
        fitting = dense + probes * self.settings.probes
        measuring = _MEASURED * min(parts.HELD_BACK, sizes.recorded)
        steps = [Step("take gradients", BACKWARD * parts.gradient_sequences(sizes.fit, sizes.length))]
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
