"""Watch the running model: what enters its FFNs, what they would have given, and which of them were skipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ffnskip.compensation.compensator import Compensator
from ffnskip.general.wrap import Applied, SkippableFFN
from ffnskip.model.sites import decoder_body, ffn_sites, input_device
from ffnskip.profiles.profile import Profile
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.recording.record import Record

_BATCH = 4  # sequences per pass


@dataclass(frozen=True)
class Seen:
    """The tokens of one pass past warm-up, in one layer of the skip region.

    Attributes:
        place: of the layer in the region.
        x: the FFN's input, ``[n, hidden]``.
        f: the FFN's output, also where it was skipped, ``[n, hidden]``.
        skipped: ``[n]`` bool.
        compensator: the layer's probe and ``g``.
    """

    place: int
    x: Tensor
    f: Tensor
    skipped: Tensor
    compensator: Compensator


@torch.inference_mode()
def observe(lab: Lab, profile: Profile, sequences: Tensor, see: Callable[[Seen], None], what: str) -> None:
    """Run ``sequences [n, length]`` in score mode, and show `see` every layer of every pass.

    The states are those of the model that skips; a profile that never skips shows those of the dense model.
    """
    with Applied(lab.model, profile, "score"):
        wrappers = [site.layer.mlp for site in ffn_sites(lab.model) if isinstance(site.layer.mlp, SkippableFFN)]
        for place, wrapper in enumerate(wrappers):
            wrapper.register_forward_hook(partial(_observe, place, profile.skip.warm_up, see))
        batches = sequences.split(_BATCH)
        for batch in lab.track(batches, what, len(batches)):
            decoder_body(lab.model)(batch.long().to(input_device(lab.model)), use_cache=False)


def record_scores(lab: Lab, profile: Profile, sequences: Tensor, prompt: int) -> Record:
    """What the probes say in the running model.

    Args:
        lab: with the dense model.
        profile: with probes; it skips meanwhile, as skipping changes what later probes see.
        sequences: ``[n, length]``.
        prompt: tokens at the start of each sequence that are not recorded.

    Returns:
        ``[n, length - prompt, n_layers]`` log nats; infinite within the warm-up and outside the skip region.
    """
    skip = profile.skip.model_copy(update={"warm_up": profile.skip.warm_up + prompt})
    past = sequences.shape[1] - skip.warm_up
    scores = torch.full((len(sequences), sequences.shape[1], profile.model.n_layers), math.inf)
    done = [0] * profile.model.n_layers

    def see(seen: Seen) -> None:
        score = seen.compensator.probe(seen.x)
        assert score is not None, "the rule has no probe"
        rows = score.view(-1, past).cpu()
        start = done[seen.place]
        scores[start : start + len(rows), skip.warm_up :, skip.cold_s + seen.place] = rows
        done[seen.place] += len(rows)

    behind = profile.model_copy(update={"skip": skip})
    observe(lab, behind, sequences, see, "recording predicted damages")
    return Record(sequences, scores[:, prompt:])


def _observe(
    place: int,
    warm_up: int,
    see: Callable[[Seen], None],
    wrapper: SkippableFFN,
    args: tuple[Tensor, ...],
    output: Tensor,
) -> None:
    x = args[0][:, warm_up:].flatten(0, 1)
    f = output[:, warm_up:].flatten(0, 1)
    skipped = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if wrapper.skipping is not None:
        skipped = wrapper.skipping.view(args[0].shape[:2])[:, warm_up:].flatten()
        if bool(skipped.any()):
            f = f.clone()  # the model goes on with what the compensation gave
            f[skipped] = wrapper.run(x[None, skipped])[0].to(f.dtype)
    see(Seen(place, x, f, skipped, wrapper.compensator))
