"""From text to profiles: record, choose and fit the rule, solve and verify its thresholds, measure what they cost.

Each stage knows how it runs and what it costs at most, so that a forecast is the sum of the stages.
"""

from __future__ import annotations

from ffnskip.general.apply import self_check
from ffnskip_cli.calibration.assemble import Calibration, assemble, describe
from ffnskip_cli.calibration.lab import Lab, Sizes, Step
from ffnskip_cli.calibration.recording.collect import RecordStage
from ffnskip_cli.calibration.recording.file import Statistics
from ffnskip_cli.calibration.rules import compiler_of
from ffnskip_cli.calibration.settings import Settings
from ffnskip_cli.calibration.threshold.goals import CURVE_POINTS, HeldOut, MeasureStage, SolveStage
from ffnskip_cli.measure.quality import check_size
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
