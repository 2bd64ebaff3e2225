"""What a calibration needs at most: time, from a few passes timed now, and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.compensation.kinds import KINDS
from ffnskip.decode import GeneralPath, generate_tokens
from ffnskip.model.forward import forward
from ffnskip.model.neurons import count_neurons
from ffnskip.model.sites import ffn_sites, input_device
from ffnskip_cli.calibration.fit.stage import candidates, compensation_of
from ffnskip_cli.calibration.lab import Step
from ffnskip_cli.calibration.recording.record import BLOCK
from ffnskip_cli.calibration.settings import Settings
from ffnskip_cli.measure.quality import ROWS as QUALITY_ROWS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TIMED = 3  # passes and decode steps that the estimate of the time rests on


@torch.inference_mode()
def seconds(model: PreTrainedModel, tokens: Tensor, planned: list[Step]) -> list[float]:
    """How long each step will take at most, from a few passes over ``tokens [sequences, length]`` timed now."""
    sequence = tokens[:1].long().to(input_device(model))
    of_pass = _median_time(
        lambda: forward(model, sequence, use_cache=False).logits.float().log_softmax(-1)[0, -1, 0].item()
    )
    of_decode_step = 0.0
    if any(step.decode_steps for step in planned):
        prompts = tokens[: BLOCK["generated"], : tokens.shape[1] // 2].long().to(input_device(model))
        ticks = [time.perf_counter() for _ in generate_tokens(GeneralPath(model), prompts, max_new_tokens=_TIMED + 1)]
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
    features = hidden + compensation.neurons + 1 if KINDS[compensation.kind].reads_input else 1
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
