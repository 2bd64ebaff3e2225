"""YAML as profiles use it: the plain data of YAML 1.2, read from untrusted bytes and written in one fixed form.

Profiles travel in pull requests, so reading refuses all that a profile does not need: anchors, aliases, tags,
directives, merge keys, duplicate keys, several documents, deep nesting and large files. PyYAML's event stream is built
into a tree without recursion, and scalars get their types from the core schema of YAML 1.2, not from YAML 1.1.
"""

import re
from typing import Any, NoReturn

import yaml

from ffnskip.errors import ProfileError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16
TOO_LARGE = f"the file is larger than {MAX_BYTES // 1024} KiB, the most that a profile may take"
MAX_KEY_LENGTH = 64
MAX_NUMBER_LENGTH = 64

_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_PREFIXED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def sentence(source: str, where: str, what: str) -> str:
    """`source: where: what` on one printable line of bounded length; an empty `where` is left out."""
    parts = [one_line(source, 200), one_line(where, 120), one_line(what, 300)]
    return ": ".join(part for part in parts if part)


def one_line(text: str, limit: int) -> str:
    """The first `limit` characters of `text`, with what a terminal could obey replaced by question marks."""
    shown = "".join(character if character.isprintable() else "?" for character in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def load(data: bytes, source: str) -> Any:
    """Build the one document in `data` from dict, list, str, int, float, bool and None.

    Raises ProfileError, whatever the bytes, with one sentence that starts with `source` and the dotted field.
    """
    builder = _Builder(source)
    text = _decode(data, builder)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            builder.feed(event)
    except yaml.reader.ReaderError as error:
        builder.fail(f"the character U+{int(error.character):04X} is not allowed in YAML; remove it")
    except yaml.MarkedYAMLError as error:
        builder.fail(f"not valid YAML{_position(error)} ({error.problem})")
    except (ValueError, OverflowError):  # PyYAML lets them through for "\UFFFFFFFF" and for %YAML with a huge number
        builder.fail("not valid YAML (a number or an escape is out of range)")
    if not builder.documents:
        builder.fail("the file is empty")
    return builder.root


def dump(data: dict[str, Any]) -> str:
    """Write plain data so that YAML 1.1 and YAML 1.2 readers agree on it; mappings of scalars take the flow style."""
    return yaml.dump(data, Dumper=_Dumper, default_flow_style=None, sort_keys=False, width=120, allow_unicode=True)


def _decode(data: bytes, builder: "_Builder") -> str:
    if len(data) > MAX_BYTES:
        builder.fail(TOO_LARGE)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        builder.fail(f"byte {error.start} is not UTF-8; save the file as plain UTF-8")
    if text.startswith("\ufeff"):
        builder.fail("the file starts with a byte order mark; save it as UTF-8 without one")
    return text


class _Frame:
    """One open mapping or list, its dotted place, and the key that waits for a value."""

    def __init__(self, where: str, node: dict[str, Any] | list[Any]) -> None:
        self.where = where
        self.node = node
        self.key: str | None = None

    def child(self) -> str:
        """The dotted place of the value that comes next."""
        part = str(len(self.node)) if isinstance(self.node, list) else self.key
        return ".".join(name for name in (self.where, part) if name)


class _Builder:
    """Turns YAML events into a tree; the open nodes are a list, so no input can exhaust the Python stack."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.documents = 0
        self.root: Any = None
        self._stack: list[_Frame] = []

    def feed(self, event: yaml.Event) -> None:
        match event:
            case yaml.DocumentStartEvent():
                self._start_document(event)
            case yaml.AliasEvent():
                self.fail("an alias (*) is not allowed in a profile; write the value out")
            case yaml.ScalarEvent():
                self._check_bare(event)
                self._put(self._plain(event.value) if event.implicit[0] else event.value)
            case yaml.MappingStartEvent():
                self._open(event, {})
            case yaml.SequenceStartEvent():
                self._open(event, [])
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                self._stack.pop()

    def fail(self, what: str) -> NoReturn:
        where = self._stack[-1].child() if self._stack else ""
        raise ProfileError(sentence(self.source, where, what)) from None

    def _start_document(self, event: yaml.DocumentStartEvent) -> None:
        self.documents += 1
        if self.documents > 1:
            self.fail("the file has more than one YAML document; keep one")
        if event.version or event.tags:
            self.fail("a YAML directive (%) is not allowed in a profile; remove it")

    def _check_bare(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent) -> None:
        if event.anchor is not None:
            self.fail("an anchor (&) is not allowed in a profile; remove it")
        if event.tag is not None:
            self.fail("a tag (!) is not allowed in a profile; remove it")

    def _open(self, event: yaml.CollectionStartEvent, node: dict[str, Any] | list[Any]) -> None:
        self._check_bare(event)
        if len(self._stack) == MAX_DEPTH:
            self.fail(f"nested deeper than {MAX_DEPTH} levels")
        where = self._stack[-1].child() if self._stack else ""
        self._put(node)
        self._stack.append(_Frame(where, node))

    def _put(self, value: Any) -> None:
        if not self._stack:
            self.root = value
            return
        frame = self._stack[-1]
        if isinstance(frame.node, list):
            frame.node.append(value)
        elif frame.key is None:
            frame.key = self._checked_key(value, frame.node)
        else:
            frame.node[frame.key] = value
            frame.key = None

    def _checked_key(self, key: Any, seen: dict[str, Any]) -> str:
        if not isinstance(key, str):
            self.fail("every key must be text; put it in quotes")
        if len(key) > MAX_KEY_LENGTH or not key.isprintable():
            self.fail(f"a key is longer than {MAX_KEY_LENGTH} characters or holds control characters")
        if key in seen:
            self._stack[-1].key = key
            self.fail("the key appears twice; keep one")
        return key

    def _plain(self, text: str) -> str | int | float | bool | None:
        """Give an unquoted scalar its type: the core schema of YAML 1.2, section 10.3.2."""
        if text == "<<":
            self.fail("a merge key (<<) is not allowed in a profile; write the keys out")
        if text in _WORDS:
            return _WORDS[text]
        if _NOT_FINITE.fullmatch(text):
            return float(text.replace(".", ""))
        if not (_FLOAT.fullmatch(text) or _PREFIXED.fullmatch(text)):
            return text
        if len(text) > MAX_NUMBER_LENGTH:
            self.fail(f"a number of {len(text)} characters; write at most {MAX_NUMBER_LENGTH}")
        if _PREFIXED.fullmatch(text):
            return int(text, 0)
        return int(text) if _DECIMAL.fullmatch(text) else float(text)


def _position(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark
    return f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""


class _Dumper(yaml.SafeDumper):
    """Quotes hashes, and strings that either version of YAML would take for something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_hash = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if is_hash else None)


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    return dumper.represent_float(value + 0.0)  # -0.0 equals 0.0, so it must not be written differently


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(float, _represent_float)
for _number in (_FLOAT, _PREFIXED):
    _Dumper.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(rf"(?:{_number.pattern})\Z"), list("-+.0123456789")
    )
