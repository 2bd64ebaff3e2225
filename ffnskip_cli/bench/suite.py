"""The whole benchmark of one profile: the dense model, the profile, Hugging Face's loop, and the opponents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ffnskip.decoder import Decoder
from ffnskip.errors import FfnskipError
from ffnskip.model.sites import input_device
from ffnskip_cli.bench.layers import kl_by_layer
from ffnskip_cli.bench.rows import empty_row, of_continuation, of_dense, of_quality, of_speed
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.measure.flops import NO_OVERHEAD, mean_keys, model_cost, overhead
from ffnskip_cli.measure.quality import Quality, measure_quality
from ffnskip_cli.measure.speed import Speed, decoder_way, hugging_face_way, measure_speed
from ffnskip_cli.measure.worst_case import Continuation, continue_prompts
from ffnskip_cli.opponents import OPPONENTS, Field, Opponent, set_up
from ffnskip_cli.progress import Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("quality", "opponents", "speed", "worst-case", "layers")
_SAMPLE = 8  # sequences that opponents are set up on; that they are tested on them too is in their favour


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        parts: some of `PARTS`.
        prompt_tokens, new_tokens: lengths of the decodes that are timed and checked for the worst case.
        repetitions: timed runs per row.
        prompts: how many continuations the worst case is taken over.
        opponents: names of `OPPONENTS`, for the part of that name.
    """

    parts: frozenset[str]
    prompt_tokens: int
    new_tokens: int
    repetitions: int
    prompts: int
    opponents: tuple[str, ...] = tuple(OPPONENTS)

    def refuse_short(self, warm_up: int) -> None:
        """Raise FfnskipError if all that would be generated is warm-up."""
        if self.parts & {"speed", "worst-case"} and self.new_tokens <= warm_up + 1:
            raise FfnskipError(
                f"With a warm-up of {warm_up} none of {self.new_tokens} new tokens could skip: generate more."
            )


def run_suite(
    model: PreTrainedModel,
    decoder: Decoder,
    text: Tensor,
    plan: Plan,
    track: Track,
    *,
    timed_text: Tensor | None = None,
    original: PreTrainedModel | None = None,
) -> list[dict[str, Any]]:
    """Measure the rows `dense`, `ffnskip`, `hf-dense` and the opponents; a figure that was not measured is None.

    Args:
        model: the dense model.
        decoder: of that model, with the profile.
        text: ``[sequences, length]`` to score, and whose beginnings are the prompts.
        plan: what to measure; opponents and layers only beside `quality`, as they are held against the profile's.
        track: shows progress.
        timed_text: ``[sequences, prompt + new tokens or more]`` to time decoding along; None to time the models' own
            continuations of the prompts.
        original: of a packed model, what it was packed from: its quality is what the others are compared with, and it
            is what Hugging Face's own loop runs.

    Raises:
        FfnskipError: all generated tokens would be warm-up.
    """
    profile = decoder.profile
    assert profile is not None
    plan.refuse_short(profile.skip.warm_up)
    cost, added = model_cost(model), overhead(profile, model)
    prompts = text[:, : plan.prompt_tokens].to(input_device(model))
    # The dense one is made last: the model then lies row by row again, which is how Hugging Face's loop reads it fast.
    decoders = {"ffnskip": decoder, "dense": Decoder(model)}
    qualities: dict[str, Quality] = {}
    texts: dict[str, Continuation] = {}
    timed: dict[str, dict[str, Any]] = {}
    if "quality" in plan.parts:
        measured = {"ffnskip": profile} if original is None else {"dense": profile.never, "ffnskip": profile}
        scores = measure_quality(model, list(measured.values()), text, track, reference=original, by_token=True)
        qualities = dict(zip(measured, scores, strict=True))
    if "worst-case" in plan.parts:
        chosen = prompts[: plan.prompts]
        texts = {name: continue_prompts(one, chosen, plan.new_tokens, track) for name, one in decoders.items()}
    if "speed" in plan.parts:
        speeds = _speeds(decoders, original or model, prompts, timed_text, plan, track)
        keys = mean_keys(plan.prompt_tokens + profile.skip.warm_up, plan.new_tokens - profile.skip.warm_up)
        timed = {name: of_speed(speed, speeds["dense"], cost, added, keys) for name, speed in speeds.items()}
    quality, length = qualities.get("ffnskip"), text.shape[1]
    dense_quality = of_dense(quality, cost, length) | of_quality(qualities.get("dense"), cost, NO_OVERHEAD, length)
    by_row = {"dense": dense_quality, "ffnskip": of_quality(quality, cost, added, length)}
    if "layers" in plan.parts:
        by_row["ffnskip"] |= {"kl_by_layer": kl_by_layer(model, profile, text[:_SAMPLE], track)}
    rows = [empty_row(row) | by_row[row] | of_continuation(texts.get(row)) | timed.get(row, {}) for row in by_row]
    if "hf-dense" in timed:
        rows.append(empty_row("hf-dense") | timed["hf-dense"])
    if "opponents" in plan.parts:
        field = Field(Lab(model, track), profile, by_row["ffnskip"]["flops_saved_past_warm_up"], text[:_SAMPLE])
        rows += opponent_rows(plan.opponents, field, text, original)
    return rows


def opponent_rows(
    names: tuple[str, ...], field: Field, text: Tensor, original: PreTrainedModel | None = None
) -> list[dict[str, Any]]:
    """A row for each opponent, on ``text [sequences, length]``; one that cannot save so much says why in `missing`."""
    found, missing = set_up(names, field) if field.saved > 0 else ({}, dict.fromkeys(names, "nothing is saved"))
    rows = measured_rows(found, field, text, original) + [empty_row(name, why) for name, why in missing.items()]
    return sorted(rows, key=lambda row: names.index(row["name"]))


def measured_rows(
    opponents: dict[str, Opponent], field: Field, text: Tensor, original: PreTrainedModel | None = None
) -> list[dict[str, Any]]:
    """A row for each, on ``text [sequences, length]``, from the first position past the field's warm-up on."""
    if not opponents:
        return []
    qualities = measure_quality(
        field.model,
        [opponent.profile for opponent in opponents.values()],
        text,
        field.lab.track,
        what="measuring opponents",
        first=field.first,
        ways=[opponent.way for opponent in opponents.values()],
        reference=original,
        by_token=True,
    )
    rows = []
    for (name, opponent), quality in zip(opponents.items(), qualities, strict=True):
        added = overhead(opponent.profile, field.model) if opponent.way is None else NO_OVERHEAD
        rows.append(empty_row(name) | of_quality(quality, field.cost, added, text.shape[1]))
    return rows


def _speeds(
    decoders: dict[str, Decoder],
    users_model: PreTrainedModel,
    prompts: Tensor,
    text: Tensor | None,
    plan: Plan,
    track: Track,
) -> dict[str, Speed]:
    """Of the decoders and of Hugging Face's loop, along the text if there is one."""
    profile = decoders["ffnskip"].profile
    assert profile is not None
    warm_up, forced = profile.skip.warm_up, None
    ways = {name: decoder_way(decoders[name], warm_up) for name in ("dense", "ffnskip")}
    ways["hf-dense"] = hugging_face_way(users_model, warm_up)
    if text is not None:
        text = text.to(prompts.device)
        prompts, forced = text[:, : plan.prompt_tokens], text[:, plan.prompt_tokens :]
    return measure_speed(ways, prompts, plan.new_tokens, plan.repetitions, warm_up, track, forced)
