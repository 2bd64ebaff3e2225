"""Turn documents into packed token sequences, so that calibration and held-out text never share a document."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import torch

from ffnskip.errors import FfnskipError
from ffnskip.profiles.evidence import TextPart
from ffnskip_cli.text.sources import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    text was too short, or because only whole sequences are used. A mixture of several texts has them as its `parts`,
    and `text_sha256` is a hash over their hashes and weights.
    """

    tokens: torch.Tensor
    text_sha256: str
    tokens_requested: int
    document_hashes: frozenset[bytes]
    dataset: str
    config: str | None
    split: str | None
    revision: str | None
    parts: tuple[TextPart, ...] = ()

    @property
    def tokens_used(self) -> int:
        """The number of tokens in all sequences."""
        return self.tokens.numel()


@dataclass(frozen=True)
class Ingredient:
    """A text of a mixture, which of its documents may be used, and its weight beside the other texts."""

    source: TextSource
    part: Part
    weight: float = 1.0


def build_mixture(
    ingredients: Sequence[Ingredient],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    sequence_length: int,
    seed: int,
    exclude: frozenset[bytes] = frozenset(),
) -> Corpus:
    """Pack about `tokens` tokens of several texts, of each as many sequences as its weight by the sum of all weights.

    No sequence mixes texts, and a document that is in two of them is used once, for the first. A text that is too short
    contributes what it has; the others do not make up for it. A single text is packed as by `build_corpus`. Raises
    FfnskipError if there is not a whole sequence of each text.
    """
    _refuse_sizes(tokens, sequence_length)
    shares = _shares(ingredients, tokens // sequence_length)
    packed: list[Corpus] = []
    for ingredient, share in zip(ingredients, shares, strict=True):
        part = build_corpus(
            ingredient.source,
            tokenizer,
            tokens=tokens if len(ingredients) == 1 else share * sequence_length,
            sequence_length=sequence_length,
            seed=seed,
            part=ingredient.part,
            exclude=exclude,
        )
        packed.append(part)
        exclude |= part.document_hashes
    if len(packed) == 1:
        return packed[0]
    parts = tuple(_text_part(corpus, ingredient.weight) for corpus, ingredient in zip(packed, ingredients, strict=True))
    return Corpus(
        tokens=torch.cat([corpus.tokens for corpus in packed])[_interleaved([len(c.tokens) for c in packed], seed)],
        text_sha256=hashlib.sha256("".join(f"{p.text_sha256} {p.weight}\n" for p in parts).encode()).hexdigest(),
        tokens_requested=tokens,
        document_hashes=frozenset().union(*(corpus.document_hashes for corpus in packed)),
        dataset="mixture",
        config=None,
        split=None,
        revision=None,
        parts=parts,
    )


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
    _refuse_sizes(tokens, sequence_length)
    prefix = _sequence_prefix(tokenizer)
    text_length = sequence_length - len(prefix)
    documents = _part_of(_mixed(source, seed), part, exclude)
    enough = tokens // sequence_length * text_length
    ids, hashes = _tokenize(documents, tokenizer, enough)
    n_sequences = min(len(ids), enough) // text_length
    if n_sequences == 0:
        raise FfnskipError(
            f"the {part} text of {source.dataset} has only {len(ids)} tokens, less than one sequence of "
            f"{sequence_length}: name a longer text or ask for shorter sequences"
        )
    rows = torch.frombuffer(ids, dtype=torch.int32, count=n_sequences * text_length).view(n_sequences, text_length)
    # In random order, as neighbours are often of one document: so that the first sequences are a sample of all.
    order = torch.randperm(n_sequences, generator=torch.Generator().manual_seed(seed))
    return Corpus(
        tokens=torch.cat([torch.tensor(prefix, dtype=torch.long).expand(n_sequences, -1), rows[order]], dim=1),
        text_sha256=hashlib.sha256(b"".join(hashes)).hexdigest(),
        tokens_requested=tokens,
        document_hashes=frozenset(hashes),
        dataset=source.dataset,
        config=source.config,
        split=source.split,
        revision=source.revision,
    )


def _refuse_sizes(tokens: int, sequence_length: int) -> None:
    if sequence_length < 2:
        raise FfnskipError(f"sequences of {sequence_length} tokens are too short: ask for at least 2")
    if tokens < sequence_length:
        raise FfnskipError(f"{tokens} tokens are less than one sequence of {sequence_length}: ask for more tokens")


def _shares(ingredients: Sequence[Ingredient], n_sequences: int) -> list[int]:
    """How many of the sequences each text contributes, by largest remainder."""
    weights = [Fraction(ingredient.weight) for ingredient in ingredients]
    exact = [weight * n_sequences / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: n_sequences - sum(shares)]:
        shares[index] += 1
    if 0 in shares:
        dataset = ingredients[shares.index(0)].source.dataset
        raise FfnskipError(
            f"{dataset} gets none of the {n_sequences} sequences of the mixture: ask for more tokens, or give it more "
            "weight"
        )
    return shares


def _interleaved(lengths: Sequence[int], seed: int) -> list[int]:
    """A random order of the sequences of all texts in which any run of them is a mixture, too.

    Each text's sequences lie one by one in equal stretches of the whole order, somewhere in their stretch.
    """
    generator = random.Random(f"{seed} mixture")
    places = [(index + generator.random()) / length for length in lengths for index in range(length)]
    return sorted(range(len(places)), key=places.__getitem__)


def _text_part(corpus: Corpus, weight: float) -> TextPart:
    return TextPart(
        dataset=corpus.dataset,
        config=corpus.config,
        split=corpus.split,
        revision=corpus.revision,
        text_sha256=corpus.text_sha256,
        weight=weight,
        tokens_used=corpus.tokens_used,
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


def first_hashes(source: TextSource) -> set[bytes]:
    """SHA-256 of the documents in the first window of a text: of these a calibration has used some."""
    return {hashlib.sha256(document.encode()).digest() for document in _window(source.documents())}


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
) -> tuple[array[int], list[bytes]]:
    """At least `enough` token ids if there are as many, and the hashes of the documents that they came from."""
    ids = array("i")
    hashes: list[bytes] = []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    while len(ids) < enough and (found := next(documents, None)):
        document, digest = found
        ids.extend(separator if hashes else [])
        # Not verbose: a document may well be longer than what the model can take, it is cut below.
        ids.extend(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
        hashes.append(digest)
    return ids, hashes


def _sequence_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts it in front of a text by itself."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []
