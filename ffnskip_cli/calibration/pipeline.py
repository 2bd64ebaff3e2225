"""From text to profiles: record, choose and fit the rule, solve and verify its thresholds, measure what they cost.

Each stage knows how it runs and what it costs at most, so that a forecast is the sum of the stages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ffnskip.compensation.kinds import KINDS
from ffnskip.general.self_check import self_check
from ffnskip.model.neurons import count_neurons
from ffnskip.model.sites import ffn_sites
from ffnskip_cli.calibration.assemble import Calibration, assemble, describe
from ffnskip_cli.calibration.fit.stage import candidates, compensation_of
from ffnskip_cli.calibration.lab import Lab, Sizes, Step
from ffnskip_cli.calibration.recording.collect import RecordStage
from ffnskip_cli.calibration.recording.file import Statistics
from ffnskip_cli.calibration.rules import compiler_of
from ffnskip_cli.calibration.settings import Settings
from ffnskip_cli.calibration.threshold.goals import CURVE_POINTS, HeldOut, MeasureStage, SolveStage
from ffnskip_cli.measure.quality import ROWS as QUALITY_ROWS
from ffnskip_cli.measure.quality import check_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnskip_cli.text.corpus import Corpus


class Pipeline:
    """One calibration, from the recording to profiles; `record` runs before `compile` and may have run elsewhere."""

    def __init__(self, settings: Settings, curve_points: int = CURVE_POINTS) -> None:
        self.settings = settings
        self.record = RecordStage(settings)
        self.choose = compiler_of(settings)
        self.solve = SolveStage(settings)
        self.measure = MeasureStage(settings, curve_points)

    def compile(
        self, lab: Lab, statistics: Statistics, held_out: Corpus, fit_text: Corpus | None = None
    ) -> Calibration:
        """Compile one profile per goal. All of them have one rule and differ in the threshold.

        Args:
            lab: with the dense model.
            statistics: the whole recording of the calibration text.
            held_out: text of which nothing was calibrated on, for quality.
            fit_text: text to fit probe and compensation to, if the settings ask for any.

        Raises:
            FfnskipError: the model cannot be wrapped, its curve has no plateau, the region is too small for a target,
                or there is too little text.
        """
        check_size(held_out.tokens, 0 if self.settings.warm_up == "auto" else self.settings.warm_up)  # a run is long
        draft, record = self.choose.run(lab, statistics, fit_text)
        self_check(lab.model, draft)
        measured = HeldOut(lab, describe(draft, statistics, held_out), held_out.tokens)
        solved = self.solve.run(lab, record, measured)
        self.measure.run(record, measured, solved)
        return assemble(lab.model, solved, measured)

    def cost(self, sizes: Sizes) -> list[Step]:
        """What will run, at most; without goals the recording alone."""
        stages = (self.record, self.choose, self.solve, self.measure) if self.settings.goals else (self.record,)
        return [step for stage in stages for step in stage.cost(sizes)]

    def memory(self, model: PreTrainedModel) -> dict[str, int]:
        """Bytes held at the same time, by name: weights, the recording, logits, and what is summed up for a fit."""
        config, settings = model.config.get_text_config(), self.settings
        length = settings.sequence_length
        recorded = settings.recorded_tokens * 4 * config.num_hidden_layers  # float32
        rows = 5 * min(length, QUALITY_ROWS) * 4  # a few float32 copies where logits are compared
        needs = {
            "weights": sum(weight.numel() * weight.element_size() for weight in model.parameters()),
            "recording": 2 * (settings.tokens // length) * (recorded + 4 * length),  # and a copy while it is saved
            # The dense ones, one profile's and the next one's, and those copies.
            "logits": (3 * length * model.dtype.itemsize + rows) * config.vocab_size,
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
        neurons = min(count_neurons(site.ffn) for site in sites)
        choice = layers * (hidden + 1) * (hidden + 1 + 3 * neurons) * 8
    # A refit's sums beside the earlier ones, a solution, and the probes'.
    sums = layers * (2 * features * (features + hidden) + 2 * features * hidden + (hidden + 1) ** 2) * 8
    return fisher + max(gradients, choice, sums)
