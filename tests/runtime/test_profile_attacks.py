"""Hostile profiles: whatever the bytes, one short printable sentence, and it names the field.

Each file in `attacks/` says in its first line how its refusal must start. Attacks that are too large for a file, or no
text at all, are made here.
"""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.factories import make_profile

from ffnskip.errors import ProfileError
from ffnskip.profiles.profile import dump_profile, parse_profile

GALLERY = sorted((Path(__file__).parent / "attacks").glob("*.yaml"))
VALID = dump_profile(make_profile())
KIB = 1024


def refusal(data: bytes | str) -> str:
    with pytest.raises(ProfileError) as caught:
        parse_profile(data, "p.yaml")
    message = str(caught.value)
    assert message.startswith("p.yaml: ")
    assert message.isprintable()
    assert len(message) < 700
    return message.removeprefix("p.yaml: ")


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_gallery_is_refused_with_the_field(path: Path) -> None:
    data = path.read_bytes()
    expected = data.decode().partition("\n")[0].removeprefix("# refused: ")
    assert refusal(data).startswith(expected)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xef\xbb\xbf" + VALID.encode(), "the file starts with a byte order mark"),
        (VALID.encode("utf-16"), "byte 0 is not UTF-8"),
        (VALID.encode("utf-16-le"), "the character U+0000 is not allowed"),
        (VALID.encode() + b"\0", "the character U+0000 is not allowed"),
        (VALID.encode() + b"# \x1b[2J", "the character U+001B is not allowed"),
        (VALID.replace("org/tiny", "org/\u00fc").encode("latin-1"), "is not UTF-8"),
        (VALID.replace("org/tiny", "org/\ud800"), "is not UTF-8"),
        (b"", "the file is empty"),
        (b"PK\x03\x04", "is not allowed"),
        (b"\x80\x04\x95", "byte 0 is not UTF-8"),
    ],
    ids=["bom", "utf-16", "utf-16-le", "null-byte", "escape", "latin-1", "surrogate", "empty", "zip", "pickle"],
)
def test_bytes_that_are_no_yaml_are_refused(data: bytes | str, reason: str) -> None:
    assert reason in refusal(data)


def test_deep_nesting_is_refused_without_recursion_and_names_the_field_and_the_limit() -> None:
    for unit in ("[", "{a: ", "- ", "? ", "[{a: ", "- - {a: ["):
        refusal("curve:\n  " + unit * 5000)
    block = "".join("  " * depth + "a:\n" for depth in range(200))
    assert refusal(block).endswith("a.a.a: nested deeper than 16 levels")
    assert refusal("curve: " + "[" * 5000).startswith("curve.0.0.0")


@pytest.mark.parametrize("unit", ["#", " ", "\n", "a", "9", ",", "'", "é", "- ", "k: v\n", "&a ", "*a ", "!", "%"])
def test_more_than_256_kib_is_refused_before_parsing(unit: str) -> None:
    assert "larger than 256 KiB" in refusal(unit * (256 * KIB + 1))
    largest = VALID + "#" * (256 * KIB - len(VALID))
    assert parse_profile(largest) == make_profile()
    assert "larger than 256 KiB" in refusal(largest + "#")


@pytest.mark.parametrize("unit", ["'", '"', "a", "9", "[", "]", "?", ":", "!", "%TAG !a! b\n", "\n", "|"])
def test_200_kib_of_noise_is_refused_briefly(unit: str) -> None:
    refusal(unit * (200 * KIB // len(unit)))


def test_input_is_never_echoed_at_length() -> None:
    long = "x" * 100_000
    assert len(refusal(VALID.replace("rule: cosine", f"rule: {long}"))) < 200
    with pytest.raises(ProfileError) as caught:
        parse_profile(b"", source=long + "\x1b[2J\n")
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


def read_or_refuse(data: bytes | str) -> None:
    """Any exception but ProfileError fails the test, and what is read can be written and read again."""
    try:
        profile = parse_profile(data)
    except ProfileError:
        return
    assert parse_profile(dump_profile(profile)) == profile


YAML_MARKS = [": ", ", ", "- ", "? ", "[", "]", "{", "}", "'", '"', "|", ">", "#", "---", "...", "<<"]
YAML_SPACES = ["\n", "  ", "\t", "\r"]
YAML_TAGS = ["&a", "*a", "!", "!!str", "!<", "%YAML 1.2\n", "%TAG ! !\n", "\\", "\\u", "\\U", "\\x"]
YAML_WORDS = ["schema", "model", "skip", "threshold", "curve", "~", ".nan", "1e3", "0x", "0o7", "9" * 70]
ODD_CHARACTERS = ["\0", "\x85", "\u2028", "\ufeff", "\ud800"]
YAML_PIECES = st.sampled_from(YAML_MARKS + YAML_SPACES + YAML_TAGS + YAML_WORDS + ODD_CHARACTERS)


@settings(deadline=None)
@given(st.binary(max_size=200), st.text(max_size=200), st.lists(YAML_PIECES, max_size=30).map("".join))
def test_random_bytes_text_and_pieces_of_yaml(data: bytes, text: str, pieces: str) -> None:
    for noise in (data, text, pieces):
        read_or_refuse(noise)


@settings(deadline=None)
@given(start=st.integers(0, len(VALID)), length=st.integers(0, 8), put=st.lists(YAML_PIECES, max_size=4).map("".join))
def test_mutated_profile(start: int, length: int, put: str) -> None:
    read_or_refuse(VALID[:start] + put + VALID[start + length :])


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400)
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner))
SECTIONS = ["schema", "model", "skip", "compensation", "similarity", "measured", "curve", "made_with"]


@settings(deadline=None)
@given(section=st.sampled_from(SECTIONS), tree=TREES)
def test_wrong_data_in_a_section(section: str, tree: object) -> None:
    others = "".join(f"{name}: {json.dumps(part)}\n" for name, part in yaml.safe_load(VALID).items() if name != section)
    read_or_refuse(f"{others}{section}: {json.dumps(tree)}\n")
