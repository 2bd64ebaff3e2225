"""Texts by the names that a user gives, alone or mixed by weight, and the names by which a profile finds them again.

Held-out documents are chosen by their content (`corpus`), so that a later `bench` finds the same held-out text again
from nothing but the profile. What it cannot know is which documents of another text, named with ``--eval-dataset``,
were calibrated on.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ffnskip.decode import GeneralPath, generate_tokens
from ffnskip.errors import FfnskipError
from ffnskip.model.sites import input_device
from ffnskip.profiles.evidence import CalibrationText, EvaluationText, TextPart
from ffnskip.sampling import Sampling
from ffnskip_cli.sources.models import LoadedModel
from ffnskip_cli.text.corpus import Corpus, Ingredient, build_mixture
from ffnskip_cli.text.sources import Documents, TextSource, open_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_MOST = 100  # parts that a profile allows
_ROWS = 16  # documents sampled side by side
_LENGTH = 512  # tokens at which a document that does not end is cut


def check_names(names: Sequence[str], offline: bool) -> None:
    """Refuse names that cannot be texts, and texts named twice, without a model and without reading any text.

    Raises:
        FfnskipError: there is no such file, demo part or dataset, a weight is wrong, or a text is named twice.
    """
    open_all(names, generate=lambda: iter(()), offline=offline)


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
            for source, weight in open_all(names, sampled_from(loaded, f"{seed} held-out"), offline)
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


def sampled_from(loaded: LoadedModel, seed: str) -> Documents:
    """The documents of the text `self`."""
    return lambda: sample_documents(loaded.model, loaded.tokenizer, seed)


def open_all(names: Sequence[str], generate: Documents, offline: bool) -> list[tuple[TextSource, float]]:
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


def sample_documents(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: str) -> Iterator[str]:
    """Sample documents at temperature 1 from nothing but the start-of-text token, without end; `seed` is any text.

    Raises:
        FfnskipError: the tokenizer has no token to start from.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise FfnskipError("The tokenizer has no start-of-text token to sample text from: name another --dataset.")
    end = {tokenizer.eos_token_id} - {None, start}
    prompts = torch.full((_ROWS, 1), start, device=input_device(model))
    for batch in itertools.count():
        sampling = Sampling(temperature=1.0, seed=random.Random(f"{seed} {batch}").getrandbits(62))
        steps = list(
            generate_tokens(GeneralPath(model), prompts, max_new_tokens=_LENGTH, sampling=sampling, stop_tokens=end)
        )
        rows = torch.stack(steps, dim=1)
        yield from tokenizer.batch_decode(rows, skip_special_tokens=True)
