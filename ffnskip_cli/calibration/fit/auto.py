"""Choose kind and size of the compensation by what they save: `--compensate auto`.

A larger compensation does less harm per skipped FFN, so that more can be skipped for the same KL, but each skip saves
less. Every candidate is fitted to the dense model, all from the same sums; its cost on the text that is held back says
how much it could skip within the budget, and the one that then saves most FLOPs, its own charged, is taken.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.compensation.compensator import Compensator
from ffnskip.model.neurons import count_neurons
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.evidence import TriedCompensation
from ffnskip.profiles.schema import Compensation
from ffnskip_cli.calibration.fit.fitter import PROBE_RIDGE, FitTask, Fitter, stored
from ffnskip_cli.calibration.fit.gradients import Gradients, with_one
from ffnskip_cli.calibration.fit.held_back import trial
from ffnskip_cli.calibration.fit.kinds import usual_neurons
from ffnskip_cli.calibration.fit.loop import Seen
from ffnskip_cli.calibration.fit.maps import solve_map
from ffnskip_cli.calibration.fit.normal import NormalEquations
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.measure.flops import model_cost, overhead

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MOST_CANDIDATES = 7


def candidates(model: PreTrainedModel) -> list[Compensation]:
    """From next to nothing to a whole linear map with neurons, in rising size."""
    hidden = model.config.get_text_config().hidden_size
    most = usual_neurons(min(count_neurons(site.layer.get_submodule("mlp")) for site in ffn_sites(model)))
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
