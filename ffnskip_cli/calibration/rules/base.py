"""The compiler half of a rule: how it is chosen and fitted, and what that costs."""

from __future__ import annotations

from typing import Any

from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Parts, Skip
from ffnskip_cli.calibration import assemble
from ffnskip_cli.calibration.fit.stage import FitStage
from ffnskip_cli.calibration.lab import Lab, Sizes, Step
from ffnskip_cli.calibration.recording.file import Statistics
from ffnskip_cli.calibration.recording.record import Record
from ffnskip_cli.calibration.settings import DEFAULT_WARM_UP, Settings
from ffnskip_cli.text.corpus import Corpus


class RuleCompiler:
    """Compiles a rule that leaves nothing to search: what the settings do not pin is the usual.

    A rule with more to choose, or whose values are not the recorded similarities, overrides `run` and `cost`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.fit = FitStage(settings)

    def run(self, lab: Lab, statistics: Statistics, fit_text: Corpus | None) -> tuple[Profile, Record]:
        """Choose and fit the rule.

        Args:
            lab: with the dense model.
            statistics: the recording of the calibration text.
            fit_text: other text of its kind; None if the settings ask for no fit.

        Returns:
            A profile without a solved threshold, for all goals, and the values that its thresholds are solved on.

        Raises:
            FfnskipError: the region is too small for every target.
        """
        draft = self.start(statistics)
        return self.fit.run(lab, draft, fit_text, statistics.record.sequences), statistics.record

    def cost(self, sizes: Sizes) -> list[Step]:
        """What `run` takes at most."""
        return self.fit.cost(sizes)

    def start(self, statistics: Statistics, parts: Parts | None = None) -> Profile:
        """A draft with what is pinned, and the usual where nothing is; `parts` for a rule that leaves some out."""
        recorded, n_layers = statistics.record.values.shape[1:]
        self.settings.refuse_region(n_layers)
        usual: dict[str, Any] = {
            "cold_s": 0,
            "cold_e": n_layers,
            "warm_up": min(DEFAULT_WARM_UP, recorded // 4),
            "window": None,
            "refresh_every": None,
        }
        pinned = {name: value for name in usual if (value := getattr(self.settings, name)) not in (None, "auto")}
        skip = Skip.model_validate({"rule": self.settings.rule, "threshold": 0.0, **usual, **pinned})
        return assemble.draft(statistics.identity.source.model, skip, parts)
