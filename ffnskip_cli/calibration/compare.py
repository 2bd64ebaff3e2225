"""Does the calibration text matter? Calibrate on each of several texts, and measure each profile on all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from ffnskip.errors import FfnskipError
from ffnskip.general.apply import self_check
from ffnskip.profiles.profile import Profile
from ffnskip_cli.budget import NOISE
from ffnskip_cli.calibration.lab import Lab, Sizes, Step
from ffnskip_cli.calibration.pipeline import Pipeline
from ffnskip_cli.calibration.recording.collect import Share, collect, identity_of
from ffnskip_cli.calibration.recording.file import Source
from ffnskip_cli.calibration.recording.ranks import Ranks
from ffnskip_cli.calibration.rules.cosine.compiler import CosineCompiler
from ffnskip_cli.calibration.settings import Settings
from ffnskip_cli.calibration.threshold.verify import Verified, verify
from ffnskip_cli.measure.quality import Estimate, Quality, check_size, measure_quality, paired_difference
from ffnskip_cli.text.corpus import Corpus, build_corpus
from ffnskip_cli.text.named import check_names, evaluation_text
from ffnskip_cli.text.self_text import sample_documents
from ffnskip_cli.text.sources import open_text
from ffnskip_cli.track import Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnskip_cli.sources.models import LoadedModel


@dataclass(frozen=True)
class ComparedText:
    """One text: what is calibrated on, and what all profiles are measured on."""

    name: str
    calibration: Corpus
    held_out: Corpus


@dataclass(frozen=True)
class Comparison:
    """Every profile on every text; indices are those of `texts`.

    Attributes:
        target: the skip_ratio that all were calibrated for.
        texts: what was compared.
        profiles: the profile calibrated on each text.
        calibration_ratios: the skip_ratio that each has on the text it was calibrated on.
        measured: ``measured[row][column]`` is the profile of text `row` on the held-out part of text `column`.
    """

    target: float
    texts: tuple[ComparedText, ...]
    profiles: tuple[Profile, ...]
    calibration_ratios: tuple[float, ...]
    measured: tuple[tuple[Quality, ...], ...]

    @property
    def foreign(self) -> list[tuple[int, int]]:
        """The row and column of each cell whose profile was calibrated on another text than it was measured on."""
        places = range(len(self.texts))
        return [(row, column) for row in places for column in places if row != column]

    def same_rule(self, row: int, column: int) -> bool:
        """Whether two texts' profiles differ in the threshold at most: one of them moved is then the other."""
        a, b = (self.profiles[index].skip.model_dump(exclude={"threshold"}) for index in (row, column))
        return a == b

    def ratio_difference(self, row: int, column: int) -> float:
        """How much more this profile skips than the text's own does."""
        ours, own = (self.measured[index][column].skip_ratio.mean for index in (row, column))
        return ours - own

    def kl_difference(self, row: int, column: int, scale: float = 1.0) -> Estimate:
        """How much more this profile's KL, times `scale`, is than that of the text's own, paired by sequence."""
        ours, own = (
            torch.tensor(self.measured[index][column].kl_by_sequence, dtype=torch.float64) for index in (row, column)
        )
        return paired_difference(scale * ours, own)

    def kl_difference_at_equal_ratio(self, row: int, column: int) -> Estimate | None:
        """The same, its KL taken in proportion at the ratio of the text's own profile; None if it skips nothing."""
        ours, own = (self.measured[index][column].skip_ratio.mean for index in (row, column))
        return self.kl_difference(row, column, own / ours) if ours else None


def beyond_noise(difference: Estimate) -> bool:
    """Whether a difference is more than two standard errors from zero."""
    return abs(difference.mean) > NOISE * difference.standard_error


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
    generate = partial(sample_documents, loaded.model, loaded.tokenizer, f"{settings.seed} calibration")
    calibration = []
    for name in names:
        source = open_text(name, offline=offline, generate=generate)
        corpus = build_corpus(
            source,
            loaded.tokenizer,
            tokens=settings.tokens,
            sequence_length=settings.sequence_length,
            seed=settings.seed,
            part="all" if source.dataset == "self" else "calibration",
        )
        calibration.append(corpus)
    exclude = frozenset[bytes]().union(*(corpus.document_hashes for corpus in calibration))
    held_out = [
        evaluation_text(
            loaded,
            [name],
            calibrated_on=[corpus.dataset for corpus in calibration],
            tokens=settings.eval_tokens,
            sequence_length=settings.sequence_length,
            seed=settings.seed,
            offline=offline,
            exclude=exclude,
        )
        for name in names
    ]
    return [ComparedText(_label(name), *parts) for name, *parts in zip(names, calibration, held_out, strict=True)]


def budget(texts: Sequence[ComparedText], settings: Settings) -> list[Step]:
    """What will run at most."""
    passes: dict[str, list[int]] = {}
    for text in texts:
        *calibrating, _ = Pipeline(settings).cost(Sizes.of(settings, len(text.calibration.tokens), 0))
        for step in calibrating:
            total = passes.setdefault(step.name, [0, 0])
            total[0] += step.passes
            total[1] += step.decode_steps
    measuring = (1 + len(texts)) * sum(len(text.held_out.tokens) for text in texts)
    return [*(Step(name, *total) for name, total in passes.items()), Step("measure quality", measuring)]


def compare(
    model: PreTrainedModel, source: Source, texts: Sequence[ComparedText], settings: Settings, track: Track
) -> Comparison:
    """Calibrate on each text for the settings' only goal, a ratio, and measure each profile on all held-out parts.

    Args:
        model: the dense model.
        source: what identifies it and its tokenizer.
        texts: at least two.
        settings: the choices, the same for every text.
        track: shows progress.

    Raises:
        FfnskipError: the model cannot be wrapped, a text's curve has no plateau, its region is too small for the
            target, or it is too short.
    """
    for text in texts:
        check_size(text.held_out.tokens, 0 if settings.warm_up == "auto" else settings.warm_up)
    found = [_calibrate(model, source, text, settings, track) for text in texts]
    profiles = [profile for profile, _ in found]
    # The same predictions count for all, or else their KL could not be compared.
    first = max(profile.skip.warm_up for profile in profiles)
    columns = [
        measure_quality(model, profiles, text.held_out.tokens, track, what=f"measuring on {text.name}", first=first)
        for text in texts
    ]
    return Comparison(
        settings.goals[0].value,
        tuple(texts),
        tuple(profiles),
        tuple(solution.ratio for _, solution in found),
        tuple(zip(*columns, strict=True)),
    )


def _calibrate(
    model: PreTrainedModel, source: Source, text: ComparedText, settings: Settings, track: Track
) -> tuple[Profile, Verified]:
    identity = identity_of(source, text.calibration, settings)
    try:
        lab = Lab(model, track)
        statistics = collect(lab, identity, text.calibration.tokens, Share(), Ranks())
        draft = CosineCompiler(settings).choose(lab, statistics)
        self_check(model, draft)
        solution = verify(lab, draft, statistics.record, settings.goals[0].value)
    except FfnskipError as error:
        raise FfnskipError(f"Calibrating on {text.name}: {error}") from None
    described = draft.model_copy(update={"calibration": identity.text})
    return described.with_threshold(solution.threshold), solution


def _label(name: str) -> str:
    """What a text is called: as the user does, but a local file by its base name, never a path."""
    return open_text(name, offline=True, generate=lambda: iter(())).dataset if os.path.isfile(name) else name
