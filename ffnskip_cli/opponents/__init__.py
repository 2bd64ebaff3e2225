"""Other ways to save FLOPs, as their papers define them, set to any saving: what a profile must be better than.

`OPPONENTS` has them by name. A saving is a share of all FLOPs past warm-up, net of what the opponent adds itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from ffnskip.errors import FfnskipError
from ffnskip.model.forward import forward
from ffnskip.model.sites import input_device
from ffnskip_cli.measure.quality import at_work
from ffnskip_cli.opponents.depth import shortgpt, skipdecode
from ffnskip_cli.opponents.field import Field, Opponent
from ffnskip_cli.opponents.parts import teal_greedy, uniform
from ffnskip_cli.opponents.patterns import non_adaptive, random, static
from ffnskip_cli.opponents.similarity import ffn_skipllm, unpublished

OPPONENTS: dict[str, Callable[[Field], Opponent]] = {
    "random": random,
    "non-adaptive": non_adaptive,
    "static": static,
    "ffn-skipllm": ffn_skipllm,
    "unpublished": unpublished,
    "shortgpt": shortgpt,
    "skipdecode": skipdecode,
    "teal": partial(uniform, "magnitude"),
    "teal-greedy": teal_greedy,
    "wina": partial(uniform, "with weights"),
    "cats": partial(uniform, "gate"),
}


def set_up(names: Iterable[str], field: Field) -> tuple[dict[str, Opponent], dict[str, str]]:
    """The opponents of these names, and why those cannot be had that are missing: the model, or the saving."""
    found, missing = {}, {}
    for name in names:
        try:
            opponent = OPPONENTS[name](field)
            _try_out(opponent, field)
        except FfnskipError as error:
            missing[name] = str(error).rstrip(".")
        else:
            found[name] = opponent
    return found, missing


@torch.inference_mode()
def _try_out(opponent: Opponent, field: Field) -> None:
    """Raise FfnskipError, before anything is measured, if the model cannot run so."""
    sequence = field.sample[0].long()
    with at_work(field.model, opponent.profile, opponent.way, sequence):
        logits = forward(field.model, sequence[None].to(input_device(field.model)), use_cache=False).logits
    if not bool(logits[0, field.first :].isfinite().all()):
        raise FfnskipError("what it predicts are no finite numbers")


__all__ = ["OPPONENTS", "Field", "Opponent", "set_up"]
