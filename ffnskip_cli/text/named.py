"""The two texts of a calibration, one to calibrate on and one to measure quality on.

Each may be a mixture of several, by weight. In a calibration they never share a document. Held-out documents are chosen
by their content (`corpus`), so that a later `bench` finds the same held-out text again from nothing but the profile.
What it cannot know is which documents of another text, named with ``--eval-dataset``, were calibrated on.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ffnskip.errors import FfnskipError
from ffnskip.profiles.schema import CalibrationText, EvaluationText, TextPart
from ffnskip_cli.calibration.fit.fit import refuse_too_little
from ffnskip_cli.calibration.settings import Settings
from ffnskip_cli.sources.models import LoadedModel
from ffnskip_cli.text.corpus import Corpus, Ingredient, build_mixture, first_hashes
from ffnskip_cli.text.self_text import sample_documents
from ffnskip_cli.text.sources import Documents, TextSource, open_text

if TYPE_CHECKING:
    from ffnskip_cli.calibration.recording.file import Identity

_MOST = 100  # parts that a profile allows


def check_names(names: Sequence[str], offline: bool) -> None:
    """Refuse names that cannot be texts, and texts named twice, without a model and without reading any text.

    Raises:
        FfnskipError: there is no such file, demo part or dataset, a weight is wrong, or a text is named twice.
    """
    _open_all(names, generate=lambda: iter(()), offline=offline)


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
    sources = _open_all(datasets, _sampled(loaded, f"{settings.seed} calibration"), offline)
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
    sources = _open_all(names, _sampled(loaded, f"{settings.seed} fit"), offline)
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
    opened = _open_all(datasets, lambda: iter(()), offline)
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


def evaluation_text(
    loaded: LoadedModel,
    names: Sequence[str],
    *,
    calibrated_on: Sequence[str],
    tokens: int,
    sequence_length: int,
    seed: int,
    offline: bool,
    exclude: frozenset[bytes] = frozenset(),
) -> Corpus:
    """Text to measure quality on: of the datasets `calibrated_on` their held-out part, of any other everything.

    Documents in `exclude` (by hash) are left out in any case. The text `self` is sampled anew, from another seed.
    """
    held_out = set(calibrated_on) - {"self"}
    return build_mixture(
        [
            Ingredient(source, "held-out" if source.dataset in held_out else "all", weight)
            for source, weight in _open_all(names, _sampled(loaded, f"{seed} held-out"), offline)
        ],
        loaded.tokenizer,
        tokens=tokens,
        sequence_length=sequence_length,
        seed=seed,
        exclude=exclude,
    )


def text_names(text: EvaluationText) -> list[str]:
    """The names, with weights if it is a mixture, under which the text of a profile's section is found again.

    Raises:
        FfnskipError: a text was a local file, whose folder a profile never names.
    """
    names = []
    for part in text.parts or (text,):
        if part.split is None and part.dataset not in ("demo", "self"):
            raise _local_file(part.dataset, text)
        weight = f"={part.weight!r}".removesuffix(".0") if isinstance(part, TextPart) else ""
        names.append(f"{part.dataset}:{part.config or ''}:{part.split or ''}".rstrip(":") + weight)
    return names


def dataset_names(text: EvaluationText) -> list[str]:
    """The datasets of a profile's section: those of the parts if it is a mixture."""
    return [part.dataset for part in text.parts or (text,)]


def _local_file(name: str, text: EvaluationText) -> FfnskipError:
    again = "name it and the others" if text.parts else "name it"
    if isinstance(text, CalibrationText):
        return FfnskipError(f"The calibration text was the local file {name}: {again} with --dataset.")
    return FfnskipError(
        f"The profile was measured on the local file {name}: {again}, or another text, with --eval-dataset."
    )


def _sampled(loaded: LoadedModel, seed: str) -> Documents:
    return lambda: sample_documents(loaded.model, loaded.tokenizer, seed)


def _open_all(names: Sequence[str], generate: Documents, offline: bool) -> list[tuple[TextSource, float]]:
    """The named texts and their weights."""
    if len(names) > _MOST:
        raise FfnskipError(f"a mixture of {len(names)} texts is too large: name at most {_MOST}")
    opened: dict[object, tuple[TextSource, float]] = {}
    for argument in names:
        name, weight = _name_and_weight(argument)
        source = open_text(name, offline=offline, generate=generate)
        identity = os.path.realpath(name) if os.path.isfile(name) else (source.dataset, source.config, source.split)
        if identity in opened:
            raise FfnskipError(f"the text {name} is named twice: name it once, with the sum of both weights")
        opened[identity] = source, weight
    return list(opened.values())


def _name_and_weight(argument: str) -> tuple[str, float]:
    """`wikitext=3` is wikitext of weight 3; what has a slash or a colon behind its last = is a name as a whole."""
    match = re.fullmatch(r"(.*)=([^/\\:=]*)", argument, re.DOTALL)
    if match is None or os.path.exists(argument):
        return argument, 1.0
    name, text = match.groups()
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0.0 < weight < math.inf:
        raise FfnskipError(f"the weight {text!r} of {name} is not a number above 0: give one such as {name}=3")
    return name, weight
