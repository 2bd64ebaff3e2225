"""A tokenizer and its chat template without transformers, whose import takes longer than all else of a start.

The tokenizer is the one that transformers' own is made around, and templates are rendered by Jinja as there. Whether
both give what transformers gives is compared before it is kept (`ffnskip_cli.commands.generation.keep`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from ffnskip.errors import FfnskipError, reason


class PlainTokenizer:
    """Turns prompts into tokens and tokens into text.

    Args:
        state: of the tokenizer, as the library writes it.
        chat_template: the model's, or None.
        special_tokens: what the template may name, such as `bos_token`.
    """

    def __init__(self, state: str, chat_template: str | None, special_tokens: Mapping[str, Any]) -> None:
        self._tokenizer = Tokenizer.from_str(state)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._chat_template, self._special_tokens = chat_template, special_tokens

    def tokens(self, text: str, raw: bool) -> list[int]:
        """A prompt, by the chat template if there is one, unless it is `raw`.

        Raises:
            FfnskipError: the chat template fails.
        """
        chat = self._chat_template is not None and not raw
        ids: list[int] = self._tokenizer.encode(self._chat(text) if chat else text, add_special_tokens=not chat).ids
        return ids

    def _chat(self, text: str) -> str:
        assert self._chat_template is not None
        given = {"messages": [{"role": "user", "content": text}], "tools": None, "documents": None}
        try:
            template = _environment().from_string(self._chat_template)
            return template.render(**given, add_generation_prompt=True, **self._special_tokens)
        except Exception as error:  # it is a program of the model's authors
            raise FfnskipError(f"The chat template fails ({reason(error)}): pass --raw.") from error

    def text(self, tokens: list[int]) -> str:
        """The text of some tokens, without special ones."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class _Generation(Extension):
    """Marks what an assistant has said, for training; it is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 -- as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """See `Extension`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """What chat templates are written for: blocks leave no white space, and there are a few names more than Jinja's."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda format: datetime.now().strftime(format)}
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own escapes what means something in HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
