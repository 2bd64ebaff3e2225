"""Turn documents into packed token sequences, so that calibration and held-out text never share a document."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from ffnskip.errors import FfnskipError
from ffnskip_cli.sources.text import TextSource

Part = Literal["calibration", "held-out", "all"]

# Documents are mixed inside windows of this many characters: wide enough to hold the demo text and any small file as a
# whole, so that its parts come out mixed, and narrow enough that an endless stream is read for seconds only.
_WINDOW_CHARACTERS = 4_000_000
_HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Corpus:
    """Packed token sequences and where they come from.

    `tokens` is a LongTensor [n_sequences, sequence_length]; `text_sha256` the hash over the SHA-256 of each document
    used, in order; `document_hashes` the same hashes as a set. `tokens_used` is less than `tokens_requested` if the
    text was too short, or because only whole sequences are used.
    """

    tokens: torch.Tensor
    text_sha256: str
    tokens_requested: int
    document_hashes: frozenset[bytes]
    dataset: str
    config: str | None
    split: str | None
    revision: str | None

    @property
    def tokens_used(self) -> int:
        """The number of tokens in all sequences."""
        return self.tokens.numel()


def build_corpus(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    sequence_length: int,
    seed: int,
    part: Part,
    exclude: frozenset[bytes] = frozenset(),
) -> Corpus:
    """Pack about `tokens` tokens of one part of `source`, its documents in an order that `seed` decides.

    Documents are separated by the tokenizer's end-of-sequence token if it has one; each sequence starts with the
    beginning-of-sequence token if the tokenizer puts it there. Documents whose hash is in `exclude` and repeated ones
    are left out. Raises FfnskipError if there is not a single whole sequence.
    """
    if sequence_length < 2:
        raise FfnskipError(f"sequences of {sequence_length} tokens are too short: ask for at least 2")
    if tokens < sequence_length:
        raise FfnskipError(f"{tokens} tokens are less than one sequence of {sequence_length}: ask for more tokens")
    prefix = _sequence_prefix(tokenizer)
    text_length = sequence_length - len(prefix)
    documents = _part_of(_mixed(source, seed), part, exclude)
    ids, hashes = _tokenize(documents, tokenizer, enough=tokens // sequence_length * text_length)
    n_sequences = len(ids) // text_length
    if n_sequences == 0:
        raise FfnskipError(
            f"the {part} text of {source.dataset} has only {len(ids)} tokens, less than one sequence of "
            f"{sequence_length}: name a longer text or ask for shorter sequences"
        )
    rows = torch.tensor(ids[: n_sequences * text_length]).view(n_sequences, text_length)
    return Corpus(
        tokens=torch.cat([torch.tensor(prefix, dtype=torch.long).expand(n_sequences, -1), rows], dim=1),
        text_sha256=hashlib.sha256(b"".join(hashes)).hexdigest(),
        tokens_requested=tokens,
        document_hashes=frozenset(hashes),
        dataset=source.dataset,
        config=source.config,
        split=source.split,
        revision=source.revision,
    )


def _mixed(source: TextSource, seed: int) -> Iterator[str]:
    """The documents in random order: a window is read, mixed and handed on before the next one is read."""
    documents = source.documents()
    if source.shuffled:
        yield from documents
        return
    generator = random.Random(seed)
    while window := list(_window(documents)):
        generator.shuffle(window)
        yield from window


def _window(documents: Iterator[str]) -> Iterator[str]:
    characters = 0
    for document in documents:
        yield document
        characters += len(document)
        if characters >= _WINDOW_CHARACTERS:
            return


def _part_of(documents: Iterator[str], part: Part, exclude: frozenset[bytes]) -> Iterator[tuple[str, bytes]]:
    """Documents with their SHA-256, each once.

    The content alone decides on which side a document falls: equal documents are never on both sides, and the held-out
    side can be found again without knowing the seed or the size of a calibration.
    """
    seen = set(exclude)
    for document in documents:
        digest = hashlib.sha256(document.encode()).digest()
        held_out = digest[0] % _HELD_OUT_ONE_IN == 0
        if digest not in seen and (part == "all" or held_out == (part == "held-out")):
            seen.add(digest)
            yield document, digest


def _tokenize(
    documents: Iterator[tuple[str, bytes]], tokenizer: PreTrainedTokenizerBase, enough: int
) -> tuple[list[int], list[bytes]]:
    """At most `enough` token ids, and the hashes of the documents that they came from."""
    ids: list[int] = []
    hashes: list[bytes] = []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    while len(ids) < enough and (found := next(documents, None)):
        document, digest = found
        ids += separator if hashes else []
        # Not verbose: a document may well be longer than what the model can take, it is cut below.
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        hashes.append(digest)
    return ids[:enough], hashes


def _sequence_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts it in front of a text by itself."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []
