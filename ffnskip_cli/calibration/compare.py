"""Does the calibration text matter? Calibrate on each of several texts, and measure each profile on all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ffnskip.errors import FfnskipError
from ffnskip_cli.calibration.assemble import Calibrated
from ffnskip_cli.calibration.lab import Lab, Sizes, Step
from ffnskip_cli.calibration.pipeline import Pipeline
from ffnskip_cli.calibration.recording.collect import Ranks, Share, identity_of
from ffnskip_cli.calibration.recording.file import Source
from ffnskip_cli.calibration.settings import Settings
from ffnskip_cli.calibration.texts import text_to_record
from ffnskip_cli.measure.quality import Estimate, Quality, check_size, paired_difference
from ffnskip_cli.text.corpus import Corpus
from ffnskip_cli.text.named import check_names, evaluation_text
from ffnskip_cli.text.sources import open_text

if TYPE_CHECKING:
    from ffnskip_cli.sources.models import LoadedModel


@dataclass(frozen=True)
class ComparedText:
    """One text: what is calibrated on, and what all profiles are measured on."""

    name: str
    calibration: Corpus
    held_out: Corpus


@dataclass(frozen=True)
class Comparison:
    """Every profile on every text; indices are those of `names`.

    Attributes:
        names: of the texts.
        calibrated: what came of calibrating on each, for the same ratio.
        measured: ``measured[row][column]`` is the profile of text `row` on the held-out part of text `column`.
    """

    names: tuple[str, ...]
    calibrated: tuple[Calibrated, ...]
    measured: tuple[tuple[Quality, ...], ...]

    def kl_difference(self, row: int, column: int) -> Estimate:
        """How much more the KL of this profile is than that of the text's own profile, paired by sequence."""
        kl, of_own_profile = (
            torch.tensor(self.measured[index][column].kl_by_sequence, dtype=torch.float64) for index in (row, column)
        )
        return paired_difference(kl, of_own_profile)


def check_texts(names: Sequence[str], offline: bool) -> None:
    """Refuse names that cannot be compared, without a model and without reading any text.

    Raises:
        FfnskipError: there are fewer than two, one has a weight, there is no such text, or one is named twice.
    """
    if len(names) < 2:
        raise FfnskipError("A comparison needs at least two texts: name each with a --dataset of its own.")
    for name in names:
        text, weight, _ = os.path.basename(name).partition("=")
        if weight and not os.path.exists(name):
            raise FfnskipError(f"Texts are compared one by one, not mixed: leave the weight of {text} out.")
    check_names(names, offline)
    labels = [_label(name) for name in names]
    for label in labels:
        if labels.count(label) > 1:
            raise FfnskipError(f"Two of the texts are called {label}: rename one of the files.")


def build_texts(loaded: LoadedModel, names: Sequence[str], settings: Settings, offline: bool) -> list[ComparedText]:
    """Build both parts of each text. What is held out of one is in the calibration part of none.

    Raises:
        FfnskipError: there is no such text, or not even one sequence of a part.
    """
    calibration = [text_to_record(loaded, [name], settings, offline) for name in names]
    held_out = [
        evaluation_text(
            loaded,
            [name],
            calibrated_on=[corpus.dataset for corpus in calibration],
            tokens=settings.eval_tokens,
            sequence_length=settings.sequence_length,
            seed=settings.seed,
            offline=offline,
            exclude=frozenset[bytes]().union(*(corpus.document_hashes for corpus in calibration)),
        )
        for name in names
    ]
    return [ComparedText(_label(name), *parts) for name, *parts in zip(names, calibration, held_out, strict=True)]


def budget(texts: Sequence[ComparedText], settings: Settings) -> list[Step]:
    """What will run at most."""
    held_out = [len(text.held_out.tokens) for text in texts]
    sizes = [Sizes.of(settings, len(text.calibration.tokens), n) for text, n in zip(texts, held_out, strict=True)]
    same_steps = zip(*(Pipeline(settings, curve_points=0).cost(size) for size in sizes), strict=True)
    calibrating = [
        Step(step.name, sum(each.passes for each in steps), sum(each.decode_steps for each in steps))
        for steps in same_steps
        for step in steps[:1]
    ]
    return [*calibrating, Step("compare the profiles", (1 + len(texts)) * sum(held_out))]


def compare(lab: Lab, source: Source, texts: Sequence[ComparedText], settings: Settings) -> Comparison:
    """Calibrate on each text for the settings' only goal, a ratio, and measure each profile on all held-out parts.

    Args:
        lab: with the dense model.
        source: what identifies it and its tokenizer.
        texts: at least two.
        settings: the choices, the same for every text.

    Raises:
        FfnskipError: the model cannot be wrapped, a text's curve has no plateau, its region is too small for the
            target, or it is too short.
    """
    for text in texts:  # now, as the run is long
        check_size(text.held_out.tokens, 0 if settings.warm_up == "auto" else settings.warm_up)
    calibrated = [_calibrate(lab, source, text, settings) for text in texts]
    profiles = [each.profile for each in calibrated]
    # The same predictions count for all, or else their KL could not be compared.
    first = max(profile.skip.warm_up for profile in profiles)
    columns = [lab.quality(profiles, text.held_out.tokens, f"measuring on {text.name}", first) for text in texts]
    return Comparison(tuple(text.name for text in texts), tuple(calibrated), tuple(zip(*columns, strict=True)))


def _calibrate(lab: Lab, source: Source, text: ComparedText, settings: Settings) -> Calibrated:
    pipeline = Pipeline(settings, curve_points=0)
    try:
        identity = identity_of(source, text.calibration, settings)
        statistics = pipeline.record.run(lab, identity, text.calibration.tokens, Share(), Ranks())
        calibration = pipeline.compile(lab, statistics, text.held_out)
        if calibration.refused:
            raise FfnskipError(calibration.refused[0])
    except FfnskipError as error:
        raise FfnskipError(f"Calibrating on {text.name}: {error}") from None
    return calibration.finished[0]


def _label(name: str) -> str:
    """What a text is called: as the user does, but a local file by its base name, never a path."""
    return open_text(name, offline=True, generate=lambda: iter(())).dataset if os.path.isfile(name) else name
