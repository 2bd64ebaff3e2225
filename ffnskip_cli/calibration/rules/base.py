"""The compiler half of a rule: how it is chosen and fitted, what that costs, and the warm-up, which all choose alike.

The warm-up is chosen by an ablation on text that the dense model wrote, as in the paper's Figure 5. How many generated
tokens must run dense before skipping is safe? The dense model continues some prompts greedily; then each warm-up is
scored along these very continuations, by its KL from the dense model over their second half, which comes after the
longest warm-up. So a short warm-up is not charged for skipping in more tokens, which is what it is for, but for what
its early skips do to all that follows, through the KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffnskip.decode import GeneralPath, generate_tokens
from ffnskip.general.wrap import Applied
from ffnskip.model.sites import input_device
from ffnskip.profiles.evidence import WarmUpTrial
from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Parts, Skip
from ffnskip_cli.budget import NOISE
from ffnskip_cli.calibration import assemble
from ffnskip_cli.calibration.fit.stage import FitStage
from ffnskip_cli.calibration.lab import Lab, Sizes, Step
from ffnskip_cli.calibration.recording.file import Statistics
from ffnskip_cli.calibration.recording.record import Record
from ffnskip_cli.calibration.settings import DEFAULT_WARM_UP, GENERATED_TOKENS, PROMPT_TOKENS, Settings
from ffnskip_cli.measure.quality import Quality, paired_difference, repetition

if TYPE_CHECKING:
    from ffnskip_cli.text.corpus import Corpus

WARM_UPS = (0, 5, 10, 20, 25, 30, 50)
PROMPTS = 16


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

    def frees_warm_up(self, record: Record) -> bool:
        """Whether the warm-up is to be chosen, and the sequences leave a choice."""
        return self.settings.warm_up == "auto" and len(possible_warm_ups(record.sequences.shape[1])) > 0

    def with_warm_up(self, lab: Lab, draft: Profile, record: Record, ratio: float) -> Profile:
        """The draft, whose threshold gives `ratio`, with the smallest warm-up that does no harm, if that is free."""
        if not self.frees_warm_up(record):
            return draft
        trials = ablate(lab, draft, record.sequences, possible_warm_ups(record.sequences.shape[1]))
        evidence = assemble.search_evidence(ratio, 0, [], trials)
        return _with_warm_up(draft, smallest_good(trials)).model_copy(update={"search": evidence})


def lengths(sequence_length: int) -> tuple[int, int]:
    """How long prompts and continuations are: the first half of a sequence, and as much again."""
    prompt = min(PROMPT_TOKENS, sequence_length // 2)
    return prompt, min(GENERATED_TOKENS, sequence_length - prompt)


def possible_warm_ups(sequence_length: int) -> tuple[int, ...]:
    """Those that leave half of a continuation to measure on; none where there is only one, which is no choice."""
    _, generated = lengths(sequence_length)
    possible = tuple(warm_up for warm_up in WARM_UPS if warm_up <= generated // 2)
    return possible if len(possible) > 1 else ()


def ablate(lab: Lab, profile: Profile, sequences: Tensor, warm_ups: Sequence[int]) -> list[WarmUpTrial]:
    """Try several warm-ups: the paper's Figure 5.

    Args:
        lab: with the dense model.
        profile: the rule to try them with, threshold and all.
        sequences: ``[n, length]``, which begin with the prompts.
        warm_ups: to try, at most half of the continuations (`lengths`) each, as all are scored on the other half.

    Returns:
        A trial for each.
    """
    prompt, generated = lengths(sequences.shape[1])
    prompts = sequences[:PROMPTS, :prompt].long()
    written = _continue(lab, None, prompts, generated)
    qualities = lab.quality(
        [_with_warm_up(profile, prompt + warm_up) for warm_up in warm_ups],
        torch.cat([prompts, written], dim=1),
        what=f"comparing {len(warm_ups)} warm-ups with the dense model",
        first=prompt + generated // 2,
    )
    best = min(qualities, key=lambda quality: quality.kl.mean)
    trials = []
    for warm_up, quality in zip(warm_ups, qualities, strict=True):
        text = _continue(lab, _with_warm_up(profile, warm_up), prompts, generated)
        trials.append(
            WarmUpTrial(
                warm_up=warm_up,
                kl=quality.kl.mean,
                standard_error=_error_of_difference(quality, best),
                repetition=repetition(text),
            )
        )
    return trials


def ablation_cost(settings: Settings, sizes: Sizes) -> list[Step]:
    """What `ablate` takes at most; nothing where the warm-up is pinned."""
    if settings.warm_up != "auto" or not (warm_ups := possible_warm_ups(sizes.length)):
        return []
    _, generated = lengths(sizes.length)
    prompts, texts = min(PROMPTS, sizes.recorded), 1 + len(warm_ups)
    return [Step(f"compare {len(warm_ups)} warm-ups", prompts * texts, generated * texts)]


def smallest_good(trials: Sequence[WarmUpTrial]) -> int:
    """The smallest warm-up whose KL is within noise of the lowest."""
    lowest = min(trial.kl for trial in trials)
    return next(trial.warm_up for trial in trials if trial.kl - lowest <= NOISE * trial.standard_error)


def _error_of_difference(one: Quality, other: Quality) -> float:
    mine, yours = (torch.tensor(quality.kl_by_sequence, dtype=torch.float64) for quality in (one, other))
    return paired_difference(mine, yours).standard_error


def _with_warm_up(profile: Profile, warm_up: int) -> Profile:
    return profile.model_copy(update={"skip": profile.skip.model_copy(update={"warm_up": warm_up})})


def _continue(lab: Lab, profile: Profile | None, prompts: Tensor, generated: int) -> Tensor:
    """Greedy continuations, ``[prompts, generated]``."""
    settings = None if profile is None else profile.deciding

    def write() -> list[list[int]]:
        # By the model's own forward pass, which is what the texts are scored with and any machine has.
        steps = generate_tokens(GeneralPath(lab.model), prompts.to(input_device(lab.model)), max_new_tokens=generated)
        what = "generating, dense" if profile is None else "generating, skipping"
        with nullcontext() if profile is None else Applied(lab.model, profile, "decode"):
            columns = [tokens.cpu() for tokens in lab.track(steps, what, generated)]
        written: list[list[int]] = torch.stack(columns, dim=1).tolist()
        return written

    return torch.tensor(lab.journal.remember(["continue", settings, prompts.tolist(), generated], write))
