"""What a calibration is going to do: forward passes, tokens, memory and time, at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.decode import decode
from ffnskip.model.neurons import count_neurons
from ffnskip.model.sites import ffn_sites, input_device
from ffnskip_cli.calibration.calibrate import ADJUSTMENTS, CURVE_POINTS
from ffnskip_cli.calibration.fit import fit
from ffnskip_cli.calibration.fit.auto import candidates
from ffnskip_cli.calibration.fit.kinds import compensation_of
from ffnskip_cli.calibration.recording.record import BLOCK, sample_size
from ffnskip_cli.calibration.rules.cosine.search import CORRECTIONS, SEARCH_TOKENS
from ffnskip_cli.calibration.rules.warm_up import PROMPTS, lengths, possible_warm_ups
from ffnskip_cli.calibration.settings import GENERATED_TOKENS, Settings
from ffnskip_cli.calibration.threshold.limit import LIMIT_TOKENS, ROUNDS
from ffnskip_cli.calibration.threshold.verify import VERIFY_ROUNDS, VERIFY_TOKENS
from ffnskip_cli.measure.quality import ROWS as QUALITY_ROWS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TIMED = 3  # passes and decode steps that the estimate of the time rests on
MOST_CANDIDATES = 7  # that `ffnskip_cli.calibration.fit.auto` compares
_BACKWARD = 3  # forward passes that a forward and backward pass costs
_MEASURED = 4  # passes that measuring a fit takes of a sequence: its scores, the dense model, and two thresholds


@dataclass(frozen=True)
class Step:
    """One step of a calibration, and at most what it costs.

    Attributes:
        name: what it does.
        passes: forward passes over one sequence each.
        decode_steps: forward passes that generate one token for each of up to 16 sequences.
    """

    name: str
    passes: int
    decode_steps: int = 0


def steps(settings: Settings, recorded: int, held_out: int) -> list[Step]:
    """What will run, for `recorded` sequences yet to be recorded and `held_out` ones to measure on."""
    length = settings.sequence_length
    found = [_recording(settings, recorded)]
    if not settings.goals:
        return found
    sequences = settings.tokens // length
    limits = [goal for goal in settings.goals if goal.kind != "target_ratio"]
    checked, scored, looked_at = (
        min(sequences, sample_size(tokens, length)) for tokens in (VERIFY_TOKENS, SEARCH_TOKENS, LIMIT_TOKENS)
    )
    looking = 2 * ROUNDS * looked_at
    warm_ups = possible_warm_ups(length) if settings.warm_up == "auto" else ()
    probing = settings.rule == "predicted-damage"
    if settings.searches or (warm_ups and not probing):
        rules = settings.candidates if settings.searches else 1
        # Every call compares at least one candidate with the dense model, whose pass is shared.
        passes = 2 * rules * (1 + CORRECTIONS) * scored + len({goal.kind for goal in limits}) * looking
        found.append(Step(f"compare up to {rules} rules" if settings.searches else "solve for the warm-ups", passes))
    fitting = _fitting(settings) if settings.fits else []
    found += fitting if probing else []
    if warm_ups:
        _, generated = lengths(length)
        prompts, runs = min(PROMPTS, sequences), 1 + len(warm_ups)
        found.append(Step(f"compare {len(warm_ups)} warm-ups", prompts * runs, generated * runs))
    found += [Step("record predicted damages", checked)] if probing else fitting
    verifying = (len(settings.goals) - len(limits)) * VERIFY_ROUNDS * checked + len(limits) * ADJUSTMENTS * looking
    found.append(Step("solve and verify", verifying))
    thresholds = CURVE_POINTS + len(settings.goals) + 1 + 2 * ADJUSTMENTS * len(limits)
    found.append(Step("measure quality", thresholds * held_out))
    return found


def _recording(settings: Settings, sequences: int) -> Step:
    if settings.on == "text":
        return Step("record similarities", sequences)
    blocks = -(-sequences // BLOCK["generated"])
    return Step("generate and record similarities", 0, blocks * (GENERATED_TOKENS + 1))


def _fitting(settings: Settings) -> list[Step]:
    """The steps of `ffnskip_cli.calibration.fit.fit`, for as much text as was asked for."""
    length = settings.sequence_length
    text = settings.fit_tokens // length
    held_back = min(fit.HELD_BACK, settings.tokens // length)
    kind, neurons = settings.compensate, settings.neurons
    dense, probes, refit = (fit.share(part, text) for part in (fit.DENSE_PART, fit.PROBE_PART, fit.REFIT_PART))
    gradients = _BACKWARD * fit.gradient_sequences(text, length)
    choosing = min(text, fit.CHOICE_SEQUENCES) if kind in ("auto", "low-rank", "linear") and neurons != 0 else 0
    fitting = dense + probes * (settings.rule == "predicted-damage")
    measuring = _MEASURED * held_back
    found = [Step("take gradients", gradients)]
    if kind == "auto":
        passes = choosing + fitting + MOST_CANDIDATES * 2 * measuring
        found.append(Step(f"compare up to {MOST_CANDIDATES} compensations", passes))
    if choosing:
        found.append(Step("choose neurons", choosing))
    return [
        *found,
        Step("fit to the dense model", fitting),
        Step(f"refit up to {fit.MAX_REFITS} times", fit.MAX_REFITS * refit),
        Step("measure the fits", (1 + fit.MAX_REFITS) * measuring),
    ]


@torch.inference_mode()
def seconds(model: PreTrainedModel, tokens: Tensor, planned: list[Step]) -> list[float]:
    """How long each step will take at most, from a few passes over ``tokens [sequences, length]`` timed now."""
    sequence = tokens[:1].long().to(input_device(model))
    of_pass = _median_time(lambda: model(sequence, use_cache=False).logits.float().log_softmax(-1)[0, -1, 0].item())
    of_decode_step = 0.0
    if any(step.decode_steps for step in planned):
        prompts = tokens[: BLOCK["generated"], : tokens.shape[1] // 2].long().to(input_device(model))
        ticks = [time.perf_counter() for _ in decode(model, prompts, max_new_tokens=_TIMED + 1)]
        of_decode_step = (ticks[-1] - ticks[0]) / _TIMED
    return [step.passes * of_pass + step.decode_steps * of_decode_step for step in planned]


def memory_bytes(model: PreTrainedModel, settings: Settings) -> dict[str, int]:
    """What will be held at the same time, by name: weights, the recording, logits, and what is summed up for a fit."""
    config = model.config.get_text_config()
    length = settings.sequence_length
    recorded = settings.recorded_tokens * 4 * config.num_hidden_layers  # float32
    # The dense logits, one profile's and the next one's, and a few float32 copies of some rows where they are compared.
    logits = (
        3 * length * config.vocab_size * model.dtype.itemsize + 5 * min(length, QUALITY_ROWS) * config.vocab_size * 4
    )
    needs = {
        "weights": sum(weight.numel() * weight.element_size() for weight in model.parameters()),
        "recording": 2 * (settings.tokens // length) * (recorded + 4 * length),  # and a copy while it is saved
        "logits": logits,
    }
    return needs | {"fit": _fit_bytes(model, settings)} if settings.fits and settings.goals else needs


def _fit_bytes(model: PreTrainedModel, settings: Settings) -> int:
    """The largest sums of a fit: those of the gradients, of the choice of neurons, or of the map and the probes."""
    sites, hidden = ffn_sites(model), int(model.config.get_text_config().hidden_size)
    all_layers = len(sites)
    layers = (all_layers if settings.cold_e is None else settings.cold_e) - (settings.cold_s or 0)
    compensation = candidates(model)[-1] if settings.compensate == "auto" else compensation_of(model, settings)
    whole = compensation.kind in ("linear", "low-rank")
    features = hidden + compensation.neurons + 1 if whole else 1
    fisher = all_layers * hidden**2 * 4  # float32
    gradients = 2 * fisher + all_layers * (hidden + 1) ** 2 * 8
    choice = 0
    if compensation.neurons:  # the sums of products of all neurons, their solution, and its errors
        neurons = min(count_neurons(site.layer.get_submodule("mlp")) for site in sites)
        choice = layers * (hidden + 1) * (hidden + 1 + 3 * neurons) * 8
    # A refit's sums beside the earlier ones, a solution, and the probes'.
    sums = layers * (2 * features * (features + hidden) + 2 * features * hidden + (hidden + 1) ** 2) * 8
    return fisher + max(gradients, choice, sums)


def _median_time(run: Callable[[], object]) -> float:
    run()  # the first one is slow
    times = []
    for _ in range(_TIMED):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)
