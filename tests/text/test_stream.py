"""An answer that is printed as its tokens come is the text of them all, whole characters at a time."""

import random

import pytest
from support.on_disk import bytes_as_tokens, pieces_as_tokens
from transformers import PreTrainedTokenizerFast

from ffnskip_cli.commands.generation.stream import Stream

BROKEN = "\N{REPLACEMENT CHARACTER}"
TOKENIZERS = {"bytes": bytes_as_tokens(), "pieces": pieces_as_tokens()}


def streamed(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> list[str]:
    """What is written by each token, and at the end."""
    parts: list[str] = []
    stream = Stream(lambda some: str(tokenizer.decode(some, skip_special_tokens=True)), parts.append)
    for token in tokens:
        stream(token)
    stream.end()
    return parts


@pytest.mark.parametrize(
    "text", ["a cab", "  a\n   cab\n\nd", "\u00fcber \U0001f600\u65e5\u672c\n\U0001f600 a", "\n", ""]
)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_parts_make_up_the_text(name: str, text: str) -> None:
    tokens = TOKENIZERS[name](text)["input_ids"]
    parts = streamed(TOKENIZERS[name], tokens)
    assert "".join(parts) == text + "\n"
    assert not any(BROKEN in part for part in parts)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_are_not_written_and_take_no_space_away(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ends = tokenizer.eos_token_id
    tokens = [ends, *tokenizer("a cab")["input_ids"], ends, *tokenizer(" d")["input_ids"][-1:], ends]
    assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_half_a_character_waits_and_is_written_at_the_end(name: str) -> None:
    tokens = TOKENIZERS[name]("ab\n\U0001f600")["input_ids"]
    assert "".join(streamed(TOKENIZERS[name], tokens)[:-1]) == "ab\n\U0001f600"
    *parts, end = streamed(TOKENIZERS[name], tokens[:-1])
    assert "".join(parts) == "ab\n"
    assert set(end) == {BROKEN, "\n"}


def test_whatever_tokens_come_each_character_is_written_once() -> None:
    tokenizer, draw = TOKENIZERS["pieces"], random.Random(0)
    some = [
        tokenizer.convert_tokens_to_ids(name)
        for name in ("a", "\u2581b", "\u2581", "<0x0A>", "<0xF0>", "<0x9F>", "<0x98>")
    ]
    for _ in range(200):
        tokens = draw.choices(some, k=12)
        whole = tokenizer.decode(tokens, skip_special_tokens=True) + "\n"
        written = "".join(streamed(tokenizer, tokens))
        # A byte that makes a run of bytes invalid undoes what was a line before it.
        assert written.replace(BROKEN, "\n").replace("\n", "") == whole.replace(BROKEN, "\n").replace("\n", "")
