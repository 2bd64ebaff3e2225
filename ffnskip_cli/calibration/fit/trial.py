"""Try a fit in the running model: watch what its FFNs do, and measure what it costs on text that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ffnskip.compensation.compensator import Compensator
from ffnskip.general.skippable import SkippableFFN
from ffnskip.general.wrap import Applied
from ffnskip.model.sites import decoder_body, first_output, input_device
from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Compensation
from ffnskip.profiles.weights import Weights
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.recording.record import Record, record_text
from ffnskip_cli.calibration.threshold.solve import highest_ratio, solve_threshold

_BATCH = 4  # sequences per pass
_BELOW, _ABOVE = 0.8, 1.25  # of the ratio: between the two the cost is taken to be a power of the ratio
_TINY = 1e-9


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
    with Applied(lab.model, profile, "score") as applied, ExitStack() as hooks:
        for place, ffn in enumerate(applied.ffns):
            hook = partial(_observe, place, ffn, sequences.shape[1], profile.skip.warm_up, see)
            hooks.callback(ffn.site.ffn.register_forward_hook(hook).remove)
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
    ffn: SkippableFFN,
    length: int,
    warm_up: int,
    see: Callable[[Seen], None],
    module: nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor | tuple[Tensor, ...],
) -> None:
    def past(of_all: Tensor) -> Tensor:  # [batch x length, ...], of which the warm-up is dropped
        return of_all.reshape(-1, length, *of_all.shape[1:])[:, warm_up:].flatten(0, 1)

    x, f = past(args[0].flatten(0, -2)), past(first_output(output).flatten(0, -2))
    skipped = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if ffn.skipping is not None:
        skipped = past(ffn.skipping)
        if bool(skipped.any()):
            f = f.clone()  # the model goes on with what the compensation gave
            f[skipped] = ffn.run(x[None, skipped])[0].to(f.dtype)
    see(Seen(place, x, f, skipped, ffn.compensator))


def trial(draft: Profile, tensors: dict[str, Tensor], threshold: float | None = None) -> Profile:
    """The draft with these weights.

    Args:
        draft: rule, region and kind of compensation.
        tensors: of the weights; missing ones are zeros, and without any there is no compensation.
        threshold: None for one at which nothing is ever skipped, so that the states are those of the dense model.
    """
    profile = draft.never if threshold is None else draft.with_threshold(threshold)
    if not tensors:
        profile = profile.model_copy(update={"compensation": Compensation(kind="none")})
    if not (shapes := profile.weight_shapes):
        return profile
    missing = {name: torch.zeros(shape) for name, shape in shapes.items() if name not in tensors}
    return profile.with_weights(Weights(tensors | missing))


@dataclass(frozen=True)
class Cost:
    """What a fit costs near the ratio: KL is taken to be a power of the ratio through two measured points.

    Attributes:
        threshold: that gives the ratio, by simulation.
        ratio: which.
        most: the largest ratio that the region allows.
        below, above: measured points (ratio, KL) on both sides.
    """

    threshold: float
    ratio: float
    most: float
    below: tuple[float, float]
    above: tuple[float, float]

    @property
    def kl(self) -> float:
        """Nats per token at exactly this ratio."""
        (low, low_kl), (high, high_kl) = self.below, self.above
        if not 0.0 < low < high:
            return high_kl
        return math.exp(math.log(low_kl) + self._power * math.log(self.ratio / low))

    def ratio_at(self, kl: float) -> float:
        """The ratio that costs `kl`, or the most that the region allows."""
        low, low_kl = self.below
        if self._power <= 0.0:
            return low
        return min(self.most, math.exp(math.log(low) + math.log(kl / low_kl) / self._power))

    @property
    def _power(self) -> float:
        (low, low_kl), (high, high_kl) = self.below, self.above
        return math.log(high_kl / low_kl) / math.log(high / low) if 0.0 < low < high else 0.0


class HeldBack:
    """Measures fits at one skip_ratio.

    Args:
        lab: with the dense model.
        sequences: ``[n, length]``, the piece of text.
        ratio: where to measure.
    """

    def __init__(self, lab: Lab, sequences: Tensor, ratio: float) -> None:
        self._lab, self._sequences, self._ratio = lab, sequences, ratio
        self._threshold: float | None = None  # the last one that was solved

    def ratio_within(self, kl: float, draft: Profile, tensors: dict[str, Tensor]) -> float:
        """The ratio that costs `kl` nats per token, measured anew where the first guess says."""
        usual = self._ratio
        self._ratio = self.measure(draft, tensors).ratio_at(kl)
        found = self.measure(draft, tensors).ratio_at(kl)
        self._ratio = usual
        return found

    def measure(self, draft: Profile, tensors: dict[str, Tensor]) -> Cost:
        """What the weights `tensors` of `draft` cost at the ratio."""
        record = self._record(draft, tensors)
        most = highest_ratio(record, draft.skip)
        wanted = min(self._ratio, most)
        thresholds = [
            solve_threshold(record, draft.skip, ratio) for ratio in (_BELOW * wanted, min(_ABOVE * wanted, most))
        ]
        trials = [trial(draft, tensors, threshold) for threshold in thresholds]
        qualities = self._lab.quality(trials, self._sequences, what="measuring the fit")
        below, above = ((quality.skip_ratio.mean, max(quality.kl.mean, _TINY)) for quality in qualities)
        self._threshold = solve_threshold(record, draft.skip, wanted)
        return Cost(self._threshold, wanted, most, below, above)

    def _record(self, draft: Profile, tensors: dict[str, Tensor]) -> Record:
        if draft.skip.by.reads != "input":
            return record_text(self._lab.model, self._sequences.long())
        # In the loop that skips already, as skipping changes what later probes see.
        return record_scores(self._lab, trial(draft, tensors, self._threshold), self._sequences, 0)
