"""Step 1, continued: the two texts of a calibration, one to calibrate on and one to measure quality on.

In a calibration they never share a document. Held-out documents are chosen by their content (`corpus`), so that a later
`bench` finds the same held-out text again from nothing but the profile. What it cannot know is which documents of
another text, named with ``--eval-dataset``, were calibrated on.
"""

from __future__ import annotations

from ffnskip.errors import FfnskipError
from ffnskip.profile import Profile
from ffnskip_cli.calibration.corpus import Corpus, build_corpus
from ffnskip_cli.calibration.self_text import sample_documents
from ffnskip_cli.calibration.settings import Settings
from ffnskip_cli.sources.models import LoadedModel
from ffnskip_cli.sources.text import TextSource, open_text


def calibration_and_held_out(
    loaded: LoadedModel, dataset: str, eval_dataset: str | None, settings: Settings, offline: bool
) -> tuple[Corpus, Corpus]:
    """Build both texts.

    Args:
        loaded: whose tokenizer packs them, and who writes the text named `self`.
        dataset: name of the calibration text.
        eval_dataset: name of the held-out text; None for the held-out part of `dataset`.
        settings: sizes and seed.
        offline: use only what is cached.

    Raises:
        FfnskipError: there is no such text, or not even one sequence of it.
    """
    source = _open(dataset, loaded, f"{settings.seed} calibration", offline)
    text = build_corpus(
        source,
        loaded.tokenizer,
        tokens=settings.tokens,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        part="all" if dataset == "self" else "calibration",
    )
    held_out = evaluation_text(
        loaded,
        eval_dataset or dataset,
        calibrated_on=source.dataset,
        tokens=settings.eval_tokens,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        offline=offline,
        exclude=text.document_hashes,
    )
    return text, held_out


def evaluation_text(
    loaded: LoadedModel,
    name: str,
    *,
    calibrated_on: str | None,
    tokens: int,
    sequence_length: int,
    seed: int,
    offline: bool,
    exclude: frozenset[bytes] = frozenset(),
) -> Corpus:
    """Text to measure quality on: of the dataset `calibrated_on` its held-out part, of any other everything.

    Documents in `exclude` (by hash) are left out in any case. The text `self` is sampled anew, from another seed.
    """
    source = _open(name, loaded, f"{seed} held-out", offline)
    held_out = source.dataset == calibrated_on and name != "self"
    return build_corpus(
        source,
        loaded.tokenizer,
        tokens=tokens,
        sequence_length=sequence_length,
        seed=seed,
        part="held-out" if held_out else "all",
        exclude=exclude,
    )


def evaluation_name(profile: Profile) -> str:
    """The name under which `open_text` finds the text that the profile's quality was measured on.

    Raises:
        FfnskipError: the profile does not say, or the text was a local file, whose folder a profile never names.
    """
    text = profile.evaluation
    if text is None:
        raise FfnskipError("The profile does not say what text it was measured on: name one with --eval-dataset.")
    if text.split is None and text.dataset not in ("demo", "self"):
        raise FfnskipError(
            f"The profile was measured on the local file {text.dataset}: name it, or another text, with --eval-dataset."
        )
    return f"{text.dataset}:{text.config or ''}:{text.split or ''}".rstrip(":")


def _open(name: str, loaded: LoadedModel, seed: str, offline: bool) -> TextSource:
    return open_text(name, offline=offline, generate=lambda: sample_documents(loaded.model, loaded.tokenizer, seed))
