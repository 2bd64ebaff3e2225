"""FFN-SkipLLM itself, as its paper and as its authors' code have it, without what this project added.

Both go by cos(h, h + f), see `ffnskip.rules.cosine`; only the threshold is solved here, for the saving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ffnskip.errors import FfnskipError
from ffnskip.profiles.profile import Profile
from ffnskip_cli.calibration.recording.record import record_text
from ffnskip_cli.calibration.rules.cosine.compiler import Region, find_region
from ffnskip_cli.calibration.threshold.move import Mover
from ffnskip_cli.opponents.field import Field, Opponent

_COLD = 5  # layers at either end that the authors' code leaves alone
_USUALLY_COLD = 2
_REFRESH = 6
_TOKENS_PER_WARM_UP = 64
_WINDOWS = (1, 2, 4, 8, None)  # the code leaves it to the user


def ffn_skipllm(field: Field) -> Opponent:
    """Algorithm 1 as printed: after a trigger all FFNs up to the cold end are skipped.

    The region is that of `as_printed`, wider where it cannot save enough.
    """
    n_layers, plateau = field.profile.model.n_layers, as_printed(field).skip
    wider = [
        {"cold_s": max(plateau.cold_s - more, 0), "cold_e": min(plateau.cold_e + more, n_layers)}
        for more in range(n_layers // 2)
    ]
    return _solved(field, wider)


def as_printed(field: Field, threshold: float = 1.0) -> Profile:
    """Algorithm 1 with this threshold, between the cold regions that the mean similarity on the sample has.

    Where it has no plateau, two layers at either end are cold.
    """
    field.refuse_without_stream()
    record = record_text(field.model, field.sample.long())
    n_layers = field.profile.model.n_layers
    try:
        region = find_region(torch.stack([layer.double().mean() for layer in record.layers(field.first)]))
    except FfnskipError:
        cold = max(0, min(_USUALLY_COLD, (n_layers - 2) // 2))
        region = Region(cold, n_layers - cold)
    return field.bare(cold_s=region.cold_s, cold_e=region.cold_e, threshold=threshold)


def unpublished(field: Field) -> Opponent:
    """The authors' code: a window, every 6th token dense, 5 + 5 cold layers, a warm-up of 1/64 of the length.

    Its window is the smallest of 1, 2, 4, 8 and all that saves enough. Its threshold, 0.95, is moved to the saving, a
    share past its own warm-up.
    """
    field.refuse_without_stream()
    n_layers = field.profile.model.n_layers
    cold = max(0, min(_COLD, (n_layers - 2) // 2))
    fixed = {
        "cold_s": cold,
        "cold_e": n_layers - cold,
        "refresh_every": _REFRESH,
        "warm_up": field.length // _TOKENS_PER_WARM_UP,
    }
    return _solved(field, [{**fixed, "window": window} for window in _WINDOWS])


def _solved(field: Field, choices: Sequence[Mapping[str, int | None]]) -> Opponent:
    """The first choice of settings that can save so much, with the threshold at which it does."""
    mistake = FfnskipError("it has no region to skip in")
    for settings in choices:
        mover = Mover(field.lab, field.bare(**settings), field.sample)
        try:
            return Opponent(mover.saving(field.saved))
        except FfnskipError as error:
            mistake = error
    raise mistake
