"""The whole calibration: corpus -> record -> regions -> solve -> verify -> profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ffnskip.apply import self_check
from ffnskip.errors import FfnskipError
from ffnskip.profile import Profile
from ffnskip.sections import ModelInfo
from ffnskip_cli.benchmark.flops import model_cost
from ffnskip_cli.benchmark.quality import Quality, check_size, measure_quality
from ffnskip_cli.calibration import assemble
from ffnskip_cli.calibration.corpus import Corpus
from ffnskip_cli.calibration.record import Record, record_generated, record_text
from ffnskip_cli.calibration.regions import Region, find_region
from ffnskip_cli.calibration.settings import GENERATED_TOKENS, PROMPT_TOKENS, Settings
from ffnskip_cli.calibration.solve import highest_ratio, solve_threshold
from ffnskip_cli.calibration.verify import Verified, verify
from ffnskip_cli.track import Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CURVE_AROUND = (0.5, 1.5)  # points of the curve beside the targets, in multiples of each


@dataclass(frozen=True)
class Calibrated:
    """A finished profile and the ratio that its threshold had on the calibration text."""

    profile: Profile
    calibration_ratio: float


@dataclass(frozen=True)
class Calibration:
    """What came of the targets: the profiles of those that could be reached, and a sentence for each that could not."""

    finished: list[Calibrated]
    refused: list[str]


def calibrate(
    model: PreTrainedModel, identity: ModelInfo, text: Corpus, held_out: Corpus, settings: Settings, track: Track
) -> Calibration:
    """Compile one profile per target.

    Args:
        model: the dense model.
        identity: what the profiles will say about it.
        text: calibration text, in sequences of ``settings.sequence_length``.
        held_out: text of which nothing was calibrated on, for quality.
        settings: the choices.
        track: shows progress.

    Raises:
        FfnskipError: the model cannot be wrapped or computes infinities, its curve has no plateau, the region is too
            small for a target, or there is too little text.
    """
    check_size(held_out.tokens, settings.warm_up)  # now, because the run is long
    record = _record(model, text.tokens, settings, track)
    past_warm_up = record.past(settings.warm_up)
    region = _region(past_warm_up, settings)
    draft = assemble.draft(identity, settings, region.cold_s, region.cold_e)
    self_check(model, draft)
    for target in settings.targets:
        solve_threshold(record, draft.skip, target)  # refuses what is out of reach before the long part
    verified, refused = _verify_each(model, draft, record, settings.targets, track)
    if not verified:
        return Calibration([], refused)
    thresholds = _curve_thresholds(record, draft, verified)
    profiles = [draft.with_threshold(threshold) for threshold in thresholds]
    quality = dict(zip(thresholds, measure_quality(model, profiles, held_out.tokens, track), strict=True))

    described = draft.model_copy(
        update={
            "calibration": assemble.calibration_text(text, settings, model.dtype),
            "evaluation": assemble.evaluation_text(held_out),
            "similarity": assemble.similarity_curve(past_warm_up),
            "curve": tuple(assemble.curve_point(threshold, quality[threshold]) for threshold in thresholds),
        }
    )
    finished = [
        Calibrated(_finish(model, described, target, solution, quality), solution.ratio)
        for target, solution in verified.items()
    ]
    return Calibration(finished, refused)


def _verify_each(
    model: PreTrainedModel, draft: Profile, record: Record, targets: tuple[float, ...], track: Track
) -> tuple[dict[float, Verified], list[str]]:
    """The solution of each target, and why the others have none: one that fails must not cost the finished ones."""
    verified: dict[float, Verified] = {}
    refused = []
    for target in targets:
        try:
            verified[target] = verify(model, draft, record, target, track)
        except FfnskipError as error:
            refused.append(str(error))
    return verified, refused


def _record(model: PreTrainedModel, tokens: Tensor, settings: Settings, track: Track) -> Record:
    if settings.on == "text":
        record = record_text(model, tokens, track)
    else:
        record = record_generated(model, tokens[:, :PROMPT_TOKENS], GENERATED_TOKENS, track)
    if not record.similarities.isfinite().all():
        raise FfnskipError("The model's activations are not finite numbers: try another --dtype, such as float32.")
    return record


def _region(similarities: Tensor, settings: Settings) -> Region:
    """The region that the settings pin, or that the curve proposes."""
    cold_s, cold_e, n_layers = settings.cold_s, settings.cold_e, similarities.shape[1]
    if cold_s is None or cold_e is None:
        found = find_region(similarities.mean(dim=0))
        cold_s = found.cold_s if cold_s is None else cold_s
        cold_e = found.cold_e if cold_e is None else cold_e
    if not 0 <= cold_s < cold_e <= n_layers:
        raise FfnskipError(
            f"The skip region [{cold_s}, {cold_e}) is not one: --cold-s must be less than --cold-e, and both lie "
            f"within the model's {n_layers} layers."
        )
    return Region(cold_s, cold_e)


def _curve_thresholds(record: Record, draft: Profile, verified: dict[float, Verified]) -> list[float]:
    """The verified thresholds and those of ratios around them, in ascending order of the ratio."""
    most = highest_ratio(record, draft.skip)
    around = {target * factor for target in verified for factor in CURVE_AROUND}
    thresholds = {solve_threshold(record, draft.skip, ratio) for ratio in around if ratio <= most}
    return sorted(thresholds | {solution.threshold for solution in verified.values()}, reverse=True)


def _finish(
    model: PreTrainedModel, described: Profile, target: float, solution: Verified, quality: dict[float, Quality]
) -> Profile:
    assert described.evaluation is not None
    found = assemble.measured(
        target, quality[solution.threshold], model_cost(model), described.evaluation.sequence_length
    )
    return described.with_threshold(solution.threshold).model_copy(update={"measured": found})
