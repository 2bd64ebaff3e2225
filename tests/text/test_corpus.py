import hashlib
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, count
from typing import Any, get_args

import pytest
import torch
from support.sentences import sentence
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast as Tokenizer
from transformers.utils import logging

from ffnskip_cli.text import corpus
from ffnskip_cli.text.corpus import Corpus, Ingredient, Part, build_corpus, build_mixture
from ffnskip_cli.text.sources import TextSource

BOS, EOS = 256, 257


def source_of(documents: list[str], *, shuffled: bool = False, dataset: str = "own") -> TextSource:
    return TextSource(dataset=dataset, split="train", documents=lambda: iter(documents), shuffled=shuffled)


def some_documents(n: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices("abcdefgh ", k=generator.randint(20, 60))) for _ in range(n)]


def digest(document: str) -> bytes:
    return hashlib.sha256(document.encode()).digest()


def build(source: TextSource, tokenizer: Tokenizer, part: Part = "all", **options: int) -> Corpus:
    return build_corpus(source, tokenizer, **{"tokens": 256, "sequence_length": 16, "seed": 0, **options}, part=part)


def mix(tokenizer: Tokenizer, *ingredients: Ingredient, **options: Any) -> Corpus:
    return build_mixture(ingredients, tokenizer, **{"tokens": 256, "sequence_length": 16, "seed": 0, **options})


def letters(letter: str, weight: float = 1.0, n: int = 100, part: Part = "all") -> Ingredient:
    """A text in which the bytes of each document are one letter and its number."""
    return Ingredient(source_of([f"{number:03}" + 20 * letter for number in range(n)], dataset=letter), part, weight)


def first_letters(tokenizer: Tokenizer, packed: Corpus) -> str:
    """The letter of each sequence, which must be only one."""
    found = ["".join(sorted({*tokenizer.decode(row)} & {*"abc"})) for row in packed.tokens]
    assert {len(letter) for letter in found} == {1}
    return "".join(found)


def test_packing_by_hand(byte_tokenizer: Tokenizer) -> None:
    backend, documents = byte_tokenizer.backend_tokenizer, ["first document", "second one", "third"]
    source, expected = source_of(documents, shuffled=True), []
    for document in documents:
        expected += [*byte_tokenizer(document)["input_ids"], EOS]
    packed = build(source, byte_tokenizer, tokens=20, sequence_length=5).tokens
    assert sorted(packed.tolist()) == sorted(expected[start : start + 5] for start in (0, 5, 10, 15))
    assert packed.dtype == torch.long

    without_eos = Tokenizer(tokenizer_object=backend)
    packed = build(source_of(["abc", "defgh"], shuffled=True), without_eos, tokens=8, sequence_length=4).tokens
    assert without_eos.decode(packed.flatten()) == "abcdefgh"

    without = build(source, byte_tokenizer, tokens=16, sequence_length=4).tokens
    adds_bos = Tokenizer(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    adds_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    packed = build(source, adds_bos, tokens=20, sequence_length=5).tokens
    assert packed[:, 0].tolist() == [BOS] * 4
    assert torch.equal(packed[:, 1:], without)


def test_same_seed_same_corpus_and_other_seed_other_order(byte_tokenizer: Tokenizer) -> None:
    before = random.getstate(), torch.get_rng_state()
    source = source_of(some_documents(100))
    for build_with in (
        lambda seed: build(source, byte_tokenizer, seed=seed),
        lambda seed: mix(byte_tokenizer, letters("a"), letters("b"), seed=seed, tokens=1024),
    ):
        one, same, other = (build_with(seed) for seed in (1, 1, 2))
        assert torch.equal(one.tokens, same.tokens)
        assert (one.text_sha256, one.document_hashes) == (same.text_sha256, same.document_hashes)
        assert not torch.equal(one.tokens, other.tokens)
        assert one.text_sha256 != other.text_sha256
    assert first_letters(byte_tokenizer, one) != first_letters(byte_tokenizer, other)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_text_hash_is_over_the_documents_used_in_order_and_the_origin_is_kept(byte_tokenizer: Tokenizer) -> None:
    source = replace(source_of(["abcd", "efgh", "unused"], shuffled=True), config="en", revision="f" * 40)
    packed = build(source, byte_tokenizer, tokens=8, sequence_length=4)
    assert packed.document_hashes == {digest("abcd"), digest("efgh")}
    assert packed.text_sha256 == hashlib.sha256(digest("abcd") + digest("efgh")).hexdigest()
    assert (packed.dataset, packed.config, packed.split, packed.revision) == ("own", "en", "train", "f" * 40)


def test_calibration_and_held_out_share_no_document(byte_tokenizer: Tokenizer) -> None:
    documents = some_documents(400)
    source = source_of(documents + documents[:200])
    parts: list[Part] = ["calibration", "held-out", "all"]
    calibration, held_out, everything = (build(source, byte_tokenizer, part, tokens=10**6) for part in parts)
    assert not calibration.document_hashes & held_out.document_hashes
    assert calibration.document_hashes | held_out.document_hashes == everything.document_hashes
    assert everything.document_hashes == {digest(document) for document in documents}
    assert 25 <= len(held_out.document_hashes) <= 80  # about one in eight


def test_held_out_documents_do_not_depend_on_seed_or_company(byte_tokenizer: Tokenizer) -> None:
    documents = some_documents(200)
    one = build(source_of(documents), byte_tokenizer, "held-out", tokens=10**6, seed=1)
    other = build(source_of(documents[::-1] + some_documents(50, seed=9)), byte_tokenizer, "held-out", tokens=10**6)
    assert one.document_hashes < other.document_hashes


def test_repeated_documents_are_used_once(byte_tokenizer: Tokenizer) -> None:
    packed = build(source_of(["repeated text"] * 50 + ["another"], shuffled=True), byte_tokenizer, sequence_length=4)
    assert packed.tokens_used == (len("repeated text") + 1 + len("another")) // 4 * 4


def test_only_whole_sequences_are_used_and_a_shortfall_is_recorded(byte_tokenizer: Tokenizer) -> None:
    for source, requested, used in ((source_of(["x" * 37]), 1000, 32), (source_of(some_documents(50)), 100, 96)):
        packed = build(source, byte_tokenizer, tokens=requested)
        assert packed.tokens.shape == (used // 16, 16)
        assert (packed.tokens_requested, packed.tokens_used) == (requested, used)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": 15, "sequence_length": 16}, "15 tokens are less than one sequence of 16"),
        ({"tokens": 64, "sequence_length": 1}, "at least 2"),
        ({"tokens": 64, "sequence_length": 64}, "has only 11 tokens"),
    ],
)
def test_less_than_one_sequence(byte_tokenizer: Tokenizer, options: dict[str, int], words: str) -> None:
    assert words in sentence(lambda: build(source_of(["eleven byte"]), byte_tokenizer, **options))
    nothing = sentence(lambda: build(source_of([]), byte_tokenizer, "held-out"))
    assert "the held-out text of own has only 0 tokens" in nothing


def test_an_endless_stream_is_read_as_far_as_needed(byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_WINDOW_CHARACTERS", 1000)
    read: list[str] = []

    def documents() -> Iterator[str]:
        for number in count():
            read.append(f"document {number:091}")  # a hundred characters
            yield read[-1]

    source = TextSource(dataset="stream", documents=documents)
    packed = build(source, byte_tokenizer, tokens=1504)
    assert packed.tokens_used == 1504
    assert len(read) == 20  # two windows: the first has 1,000 tokens, and a mixed window is read to its end
    first = {digest(document) for document in read[:10]}
    assert first < packed.document_hashes

    read.clear()
    build(replace(source, shuffled=True), byte_tokenizer, tokens=256)
    assert len(read) == 3
    read.clear()
    share = Ingredient(replace(source, shuffled=True), "all")
    mix(byte_tokenizer, share, letters("b", weight=3.0), tokens=1600)
    assert len(read) == 4


def test_long_documents_cause_no_warning(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = Tokenizer(tokenizer_object=byte_tokenizer.backend_tokenizer, model_max_length=64)
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    logging.set_verbosity_warning()
    build(source_of(["long " * 100]), tokenizer, tokens=496)
    assert not caplog.records


def test_a_single_text_is_no_mixture(byte_tokenizer: Tokenizer) -> None:
    source = source_of(some_documents(100))
    alone = build(source, byte_tokenizer, tokens=250)
    packed = mix(byte_tokenizer, Ingredient(source, "all", weight=3.0), tokens=250)
    assert torch.equal(packed.tokens, alone.tokens)
    assert replace(packed, tokens=alone.tokens) == alone


@pytest.mark.parametrize(
    ("weights", "n_sequences", "shares"),
    [
        ((1, 1), 16, (8, 8)),
        ((3, 1), 16, (12, 4)),
        ((1, 1, 1), 16, (6, 5, 5)),
        ((0.5, 0.1, 0.2), 11, (7, 1, 3)),
        ((1e308, 1e308), 2, (1, 1)),
    ],
)
def test_weights_share_out_the_sequences(
    byte_tokenizer: Tokenizer, weights: tuple[float, ...], n_sequences: int, shares: tuple[int, ...]
) -> None:
    ingredients = [letters(letter, weight) for letter, weight in zip("abc", weights, strict=False)]
    packed = mix(byte_tokenizer, *ingredients, tokens=16 * n_sequences + 5)
    found = first_letters(byte_tokenizer, packed)
    assert tuple(found.count(letter) for letter in "abc"[: len(shares)]) == shares
    assert tuple(part.tokens_used for part in packed.parts) == tuple(16 * share for share in shares)
    assert (packed.tokens_requested, packed.tokens_used) == (16 * n_sequences + 5, 16 * n_sequences)


def test_a_text_without_a_sequence_in_the_mixture(byte_tokenizer: Tokenizer) -> None:
    ingredients = (letters("a"), letters("b", weight=0.01))
    assert "b gets none of the 16 sequences" in sentence(lambda: mix(byte_tokenizer, *ingredients))


def test_a_mixture_keeps_the_origin_of_its_parts(byte_tokenizer: Tokenizer) -> None:
    web = replace(letters("a").source, config="en", revision="f" * 40)
    packed = mix(byte_tokenizer, Ingredient(web, "all", 3.0), letters("b"))
    assert (packed.dataset, packed.config, packed.split, packed.revision) == ("mixture", None, None, None)
    assert [(part.dataset, part.config, part.split, part.revision, part.weight) for part in packed.parts] == [
        ("a", "en", "train", "f" * 40, 3.0),
        ("b", None, "train", None, 1.0),
    ]
    alone = build(web, byte_tokenizer, tokens=192), build(letters("b").source, byte_tokenizer, tokens=64)
    assert [part.text_sha256 for part in packed.parts] == [corpus.text_sha256 for corpus in alone]
    assert packed.document_hashes == alone[0].document_hashes | alone[1].document_hashes


def test_the_hash_of_a_mixture_is_over_its_parts_and_their_weights(byte_tokenizer: Tokenizer) -> None:
    hashes = {
        mix(byte_tokenizer, letters(letter, weight), letters("b")).text_sha256
        for letter, weight in [("a", 1.0), ("a", 1.01), ("c", 1.0)]
    }
    assert len(hashes) == 3
    assert mix(byte_tokenizer, letters("a"), letters("b")).text_sha256 in hashes


def test_every_prefix_and_every_other_sequence_is_a_mixture(byte_tokenizer: Tokenizer) -> None:
    packed = mix(byte_tokenizer, letters("a", 3.0, n=500), letters("b", n=500), tokens=16 * 200)
    order = first_letters(byte_tokenizer, packed)
    in_prefix = accumulate(letter == "b" for letter in order)
    assert all(abs(found - length / 4) <= 1 for length, found in enumerate(in_prefix, 1))
    assert 15 < order[::2].count("b") < 35


def test_a_document_of_two_texts_is_used_once_and_a_short_text_whole(byte_tokenizer: Tokenizer) -> None:
    both = letters("a", n=20)
    more = Ingredient(source_of([*both.source.documents(), *letters("b", n=20).source.documents()]), "all")
    packed = mix(byte_tokenizer, both, more, tokens=16 * 1000)
    used = (20 * 24 - 1) // 16 * 16  # 23 bytes and a separator each, but none at the end
    assert [part.tokens_used for part in packed.parts] == [used, used]
    assert len(packed.document_hashes) == 40
    short = mix(byte_tokenizer, letters("a", n=2), letters("b"), tokens=16 * 20)
    assert [part.tokens_used for part in short.parts] == [32, 160]
    assert (short.tokens_requested, short.tokens_used) == (320, 192)


def test_held_out_documents_of_a_mixture_are_in_no_part_of_the_calibration(byte_tokenizer: Tokenizer) -> None:
    documents = [some_documents(200), some_documents(200, seed=1)]
    documents[1] += documents[0][:100]
    calibration, held_out = (
        mix(byte_tokenizer, *(Ingredient(source_of(texts), part) for texts in documents), tokens=10**6)
        for part in get_args(Part)[:2]
    )
    assert not calibration.document_hashes & held_out.document_hashes
    assert len(calibration.document_hashes | held_out.document_hashes) == 400


def test_excluded_documents_stay_out_of_every_part(byte_tokenizer: Tokenizer) -> None:
    exclude = frozenset(digest(next(letters(letter).source.documents())) for letter in "ab")
    for ingredients in ([letters("a")], [letters("a"), letters("b")]):
        packed = mix(byte_tokenizer, *ingredients, tokens=10**6, exclude=exclude)
        assert len(packed.document_hashes) == 99 * len(ingredients)
        assert not packed.document_hashes & exclude


def test_the_first_sequences_are_a_sample_of_all_documents(byte_tokenizer: Tokenizer) -> None:
    documents = [letter * 399 for letter in "abcdefgh"]  # each makes ten sequences that are all but equal
    size = {"tokens": 3200, "sequence_length": 40}
    packed = build(source_of(documents, shuffled=True), byte_tokenizer, **size).tokens
    first = {int(sequence.mode().values) for sequence in packed[:16]}
    assert len(first) > 4
    assert torch.equal(packed, build(source_of(documents, shuffled=True), byte_tokenizer, **size).tokens)
