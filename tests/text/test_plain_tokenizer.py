"""A tokenizer and chat templates without transformers do what those of transformers do."""

import pytest
from transformers import PreTrainedTokenizerFast

from ffnskip import FfnskipError
from ffnskip_cli.commands.generation.plain_tokenizer import PlainTokenizer

TEXTS = ["a cab", "  über 😀\n\n", "<s>not a beginning</s>"]
TEMPLATES = [
    "{% for message in messages %}\n  {{ message.role }}: {{ message.content | trim }}\n{% endfor %}\n{{ bos_token }}",
    "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% break %}{% endfor %}",
    "{% if tools is none and not documents %}{{ messages | tojson }}{% endif %}",
    "{% set ns = namespace(n=0) %}{{ strftime_now('%Y') }}{{ '!' if add_generation_prompt }}{{ eos_token }}{{ ns.n }}",
]


def plain(tokenizer: PreTrainedTokenizerFast, template: str | None = None) -> PlainTokenizer:
    return PlainTokenizer(tokenizer.backend_tokenizer.to_str(), template, tokenizer.special_tokens_map)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_and_text(byte_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    tokens = plain(byte_tokenizer).tokens(text, raw=False)
    assert tokens == byte_tokenizer(text)["input_ids"]
    assert plain(byte_tokenizer).text(tokens) == byte_tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates(byte_tokenizer: PreTrainedTokenizerFast, template: str, text: str) -> None:
    messages = [{"role": "user", "content": text}]
    expected = byte_tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True)
    assert plain(byte_tokenizer, template).tokens(text, raw=False) == expected["input_ids"]
    assert plain(byte_tokenizer, template).tokens(text, raw=True) == byte_tokenizer(text)["input_ids"]


@pytest.mark.parametrize("template", ["{{ raise_exception('no system') }}", "{{ messages.append(1) }}", "{% if %}"])
def test_a_template_that_fails_is_one_sentence(byte_tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    with pytest.raises(FfnskipError, match=r"The chat template fails \(.*\): pass --raw\."):
        plain(byte_tokenizer, template).tokens("a", raw=False)
