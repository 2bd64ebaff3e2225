"""How large a compensation is, where nobody said."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ffnskip.compensation.kinds import KINDS
from ffnskip.errors import FfnskipError
from ffnskip.model.neurons import count_neurons
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.schema import Compensation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnskip_cli.calibration.settings import Settings

_RANK, _RANK_ALONE = 1 / 6, 1 / 3  # of the stream's width, with neurons and without
_NEURONS = 1 / 6  # of the FFN's
_EVEN = 16  # neurons come in such groups, which matrix products like


def compensation_of(model: PreTrainedModel, settings: Settings) -> Compensation:
    """The kind and size that the settings ask for, and the usual size where they leave it open.

    Raises:
        FfnskipError: the model's FFNs have no such neurons, or the rank is more than the stream is wide.
    """
    kind = KINDS[settings.compensate]
    if not kind.reads_input:
        return Compensation.model_validate({"kind": kind.name})
    hidden = model.config.get_text_config().hidden_size
    available = min(count_neurons(site.layer.get_submodule("mlp")) for site in ffn_sites(model))
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
