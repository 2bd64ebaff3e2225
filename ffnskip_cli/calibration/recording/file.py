"""The recording as a file: measure once, solve for anything, on one machine or many.

A statistics file holds token sequences and their similarities, nothing of the size of hidden states, with the identity
of all that they depend on. Each sequence knows its place in the permuted text, so that recordings of several machines
put together are the recording of one, bit for bit, and an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ffnskip.errors import FfnskipError
from ffnskip.files import replacing
from ffnskip.profiles.evidence import CalibrationText
from ffnskip.profiles.schema import ModelInfo
from ffnskip_cli.calibration.recording.record import Record
from ffnskip_cli.calibration.settings import recorded_tokens

SCHEMA = "ffnskip-stats/v2"
_HASH_BYTES = 32


@dataclass(frozen=True)
class Source:
    """The model and tokenizer of a recording.

    Attributes:
        model: the model, with the fingerprint of its weights.
        tokenizer_sha256: hash of the tokenizer, its vocabulary and all that comes before it.
        dtype: precision of the model, such as `bfloat16`.
    """

    model: ModelInfo
    tokenizer_sha256: str
    dtype: str

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "schema": SCHEMA,
            "model": self.model.model_dump(mode="json"),
            "tokenizer_sha256": self.tokenizer_sha256,
            "dtype": self.dtype,
        }


@dataclass(frozen=True)
class Identity:
    """What a recording depends on; only recordings of one identity can be put together.

    Attributes:
        source: the model and tokenizer.
        text: the text, how it was ordered and cut, and what was recorded of it.
        documents: SHA-256 of each document in it.
        tokens_sha256: of the token ids that it was packed into.
    """

    source: Source
    text: CalibrationText
    documents: frozenset[bytes]
    tokens_sha256: str

    @property
    def sequences(self) -> int:
        """How many sequences the whole text has."""
        return self.text.tokens_used // self.text.sequence_length

    def facts(self) -> dict[str, Any]:
        """As plain data; the documents are in it by the hash of the text."""
        text = self.text.model_dump(mode="json")
        return {**self.source.facts(), "text": text, "tokens_sha256": self.tokens_sha256}


class Statistics:
    """A recording, whole or in part.

    Attributes:
        identity: what it depends on.
        record: as large as the whole recording; zero where nothing has been recorded yet.
        done: ``[sequences]`` int32, 1 where something has.
    """

    def __init__(self, identity: Identity) -> None:
        text = identity.text
        recorded = recorded_tokens(text.on, text.sequence_length)
        shape = (identity.sequences, recorded, identity.source.model.n_layers)
        self.identity = identity
        self.record = Record(
            torch.zeros(identity.sequences, text.sequence_length, dtype=torch.int32), torch.zeros(shape)
        )
        self.done = torch.zeros(identity.sequences, dtype=torch.int32)

    @property
    def missing(self) -> int:
        """How many sequences have not been recorded."""
        return int((self.done == 0).sum())

    def put(self, places: Tensor, record: Record) -> None:
        """Fill in the sequences at ``places [n]`` of the permuted text."""
        self.record.sequences[places] = record.sequences.to(torch.int32)
        self.record.values[places] = record.values
        self.done[places] = 1

    def save(self, path: Path) -> None:
        """Write what is done to a file; it is complete or untouched, never half written."""
        places = self.done.nonzero().squeeze(1)
        hashes = torch.tensor(sorted(map(list, self.identity.documents)), dtype=torch.uint8)
        tensors = {
            "places": places,
            "sequences": self.record.sequences[places],
            "similarities": self.record.values[places],
            "documents": hashes.view(-1, _HASH_BYTES),
        }
        try:
            with replacing(path) as temporary:
                save_file(tensors, temporary, metadata={"ffnskip": json.dumps(self.identity.facts(), sort_keys=True)})
                temporary.chmod(0o666 & ~_umask())  # safetensors makes files that nobody else may read
        except (OSError, SafetensorError) as error:
            raise FfnskipError(f"The statistics cannot be written to {path}: {error}.") from None


def load_statistics(paths: Collection[Path]) -> Statistics:
    """Read one or several files of one recording.

    Raises:
        FfnskipError: a file is missing, is none, is of another version or of another recording than the first, or two
            hold the same sequence.
    """
    merged: Statistics | None = None
    first = ""
    for path in paths:
        identity, places, record = _read(path)
        if merged is None:
            merged, first = Statistics(identity), str(path)
        refuse_difference(merged.identity.facts(), identity.facts(), first, str(path))
        if merged.done[places].any():
            raise FfnskipError(f"{path} holds sequences that the other files hold, too: name each part once.")
        merged.put(places, record)
    assert merged is not None, "no file was named"
    return merged


def refuse_difference(ours: dict[str, Any], theirs: dict[str, Any], our_name: str, their_name: str) -> None:
    """Raise FfnskipError, naming the first of the facts in which two identities differ."""
    expected, found = _flat(ours), _flat(theirs)
    for fact in sorted(expected | found):
        if expected.get(fact) != found.get(fact):
            raise FfnskipError(
                f"{their_name} does not fit {our_name}: {fact} is {found.get(fact)} and not {expected.get(fact)}."
            )


def _read(path: Path) -> tuple[Identity, Tensor, Record]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["ffnskip"])
            places, sequences, similarities, hashes = (
                file.get_tensor(name) for name in ("places", "sequences", "similarities", "documents")
            )
        if facts["schema"] != SCHEMA:
            raise ValueError(facts["schema"])
        identity = Identity(
            Source(
                ModelInfo.model_validate(facts["model"]),
                facts["tokenizer_sha256"],
                facts["dtype"],
            ),
            CalibrationText.model_validate(facts["text"]),
            frozenset(bytes(row) for row in hashes.tolist()),
            facts["tokens_sha256"],
        )
        _check_shapes(identity, places, sequences, similarities)
    except FileNotFoundError:
        raise FfnskipError(f"There is no statistics file {path}: record one with --stats-out.") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FfnskipError(f"{path} is no statistics file of this version ({type(error).__name__}).") from None
    return identity, places, Record(sequences, similarities)


def _check_shapes(identity: Identity, places: Tensor, sequences: Tensor, similarities: Tensor) -> None:
    text, n = identity.text, len(places)
    recorded = recorded_tokens(text.on, text.sequence_length)
    shapes = ((n, text.sequence_length), (n, recorded, identity.source.model.n_layers))
    if (tuple(sequences.shape), tuple(similarities.shape)) != shapes:
        raise ValueError("shapes")
    if n and not 0 <= int(places.min()) <= int(places.max()) < identity.sequences:
        raise ValueError("places")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves by their dotted names."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves
