"""The texts of a calibration: to record, to fit to, and to measure quality on. They never share a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ffnskip.errors import FfnskipError
from ffnskip_cli.calibration.fit.fitter import refuse_too_little
from ffnskip_cli.calibration.settings import Settings
from ffnskip_cli.sources.models import LoadedModel
from ffnskip_cli.text.corpus import Corpus, Ingredient, build_mixture, first_hashes
from ffnskip_cli.text.named import dataset_names, evaluation_text, open_all, sampled_from, text_names
from ffnskip_cli.text.sources import TextSource

if TYPE_CHECKING:
    from ffnskip_cli.calibration.recording.file import Identity


def text_to_record(loaded: LoadedModel, datasets: Sequence[str], settings: Settings, offline: bool) -> Corpus:
    """Build the text to record.

    Args:
        loaded: whose tokenizer packs it, and who writes the text named `self`.
        datasets: names of the texts, each with ``=weight`` or of weight 1.
        settings: size and seed.
        offline: use only what is cached.

    Raises:
        FfnskipError: there is no such text, or not even one sequence of it, or it is named twice.
    """
    sources = open_all(datasets, sampled_from(loaded, f"{settings.seed} calibration"), offline)
    return _calibration_part(loaded, sources, settings.tokens, settings)


def text_to_fit(
    loaded: LoadedModel, names: Sequence[str], settings: Settings, offline: bool, recorded: frozenset[bytes]
) -> Corpus:
    """More of the calibration part of the same texts, to fit probe and compensation to.

    Where there is enough text it shares no document (by hash) with what is `recorded`, because a threshold that is
    solved on the very text of a fit skips less of any other. The text `self` is costly, and no more of it is sampled
    than is recorded.

    Raises:
        FfnskipError: there is too little text.
    """
    sources = open_all(names, sampled_from(loaded, f"{settings.seed} fit"), offline)
    sampled = any(source.dataset == "self" for source, _ in sources)
    tokens = min(settings.tokens, settings.fit_tokens) if sampled else settings.fit_tokens
    whole = _calibration_part(loaded, sources, tokens, settings)
    refuse_too_little(whole.tokens)
    try:
        apart = _calibration_part(loaded, sources, tokens, settings, recorded)
    except FfnskipError:  # nothing is left
        return whole
    return apart if 2 * apart.tokens_used >= whole.tokens_used else whole


def _calibration_part(
    loaded: LoadedModel,
    sources: Sequence[tuple[TextSource, float]],
    tokens: int,
    settings: Settings,
    exclude: frozenset[bytes] = frozenset(),
) -> Corpus:
    return build_mixture(
        [
            Ingredient(source, "all" if source.dataset == "self" else "calibration", weight)
            for source, weight in sources
        ],
        loaded.tokenizer,
        tokens=tokens,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        exclude=exclude,
    )


def held_out_of(
    loaded: LoadedModel,
    identity: Identity,
    datasets: Sequence[str],
    eval_datasets: Sequence[str],
    settings: Settings,
    offline: bool,
    exclude: frozenset[bytes] = frozenset(),
) -> Corpus:
    """The held-out text for a calibration text.

    Args:
        loaded: whose tokenizer packs it.
        identity: of the calibration text.
        datasets: its names; may be empty where none of them is a local file, as the identity has them.
        eval_datasets: names of the held-out texts, if they are others than its own held-out part.
        settings: size and seed.
        offline: use only what is cached.
        exclude: documents, by hash, that it must not have, besides those of the calibration text.

    Raises:
        FfnskipError: there is not even one sequence of held-out text.
    """
    return evaluation_text(
        loaded,
        eval_datasets or datasets or text_names(identity.text),
        calibrated_on=dataset_names(identity.text),
        tokens=settings.eval_tokens,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        offline=offline,
        exclude=identity.documents | exclude,
    )


def refuse_other_texts(identity: Identity, datasets: Sequence[str], offline: bool) -> None:
    """Raise FfnskipError unless these are the recorded texts: by name and, as far as the beginning shows, content."""
    opened = open_all(datasets, lambda: iter(()), offline)
    parts = identity.text.parts or (identity.text,)
    recorded = [(part.dataset, part.config, part.split, getattr(part, "weight", 1.0)) for part in parts]
    named = [(source.dataset, source.config, source.split, weight) for source, weight in opened]
    if len(named) == 1:
        named = [(*named[0][:3], 1.0)]
    same = named == recorded and all(
        source.dataset == "self" or not identity.documents.isdisjoint(first_hashes(source)) for source, _ in opened
    )
    if not same:
        raise FfnskipError(
            f"The recording is of {' + '.join(dataset_names(identity.text))}, and what --dataset names is "
            "another text: leave it out, or name what was recorded."
        )
