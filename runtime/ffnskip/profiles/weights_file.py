"""The file with a profile's weights, as bytes. Importing this imports no torch.

It comes from strangers, together with the profile that names it, so nothing of it is believed: it must be a regular
file, of a size that the shapes in the profile imply, and have the hash that the profile names, before any of it is
parsed.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

from ffnskip.compensation.kinds import NEURONS
from ffnskip.errors import ProfileError
from ffnskip.files import read_regular
from ffnskip.profiles.strict_yaml import MAX_BYTES as MAX_PROFILE
from ffnskip.profiles.strict_yaml import sentence

MAX_BYTES = 8 * 2**30
_MAX_HEADER = 2**16  # bytes of a safetensors file that are no numbers
_BYTES = (2, 8)  # that a number may take
Shapes = Mapping[str, tuple[int, ...]]
Fact = tuple[str, tuple[int, ...]]  # type, by torch's name for it, and shape

FLOATS = ("float32", "bfloat16", "float16", "float64")
INTEGERS = ("int64", "int32", "int16")
_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_TYPES |= {"I64": "int64", "I32": "int32", "I16": "int16"}
_TYPES |= {"BOOL": "bool", "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # to be refused


def read_weights_file(path: Path, sha256: str, shapes: Shapes) -> bytes:
    """The bytes of the file.

    Raises:
        ProfileError: it is missing, no regular file, larger or smaller than tensors of these shapes can be, or has
            another hash.
    """
    least, most = (size * sum(map(prod, shapes.values())) for size in _BYTES)
    if least > MAX_BYTES:
        raise error_in(path, f"its tensors would be larger than {MAX_BYTES // 2**30} GiB")
    try:
        data = read_regular(path, min(most + _MAX_HEADER, MAX_BYTES), flags=getattr(os, "O_NOFOLLOW", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a file name"
        raise error_in(path, f"cannot be read ({reason}), and the profile needs it") from None
    if data is None:
        raise error_in(path, f"larger than the {most + _MAX_HEADER} bytes that its tensors can take")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise error_in(path, "not the file that the profile was made with, its sha256 is another one")
    return data


def weights_named_in(path: Path) -> set[str]:
    """The files of weights, by the names that `Weights` gives them, that a profile mentions, whatever it is like."""
    try:
        data = read_regular(path, MAX_PROFILE) or b""
    except (OSError, ValueError):
        return set()
    return set(re.findall(r"\bweights-[0-9a-f]{12}\.safetensors\b", data.decode(errors="replace")))


def check_header(data: bytes, shapes: Shapes, source: str) -> None:
    """Raise ProfileError unless this is a safetensors file with exactly the tensors of these shapes."""
    from safetensors import SafetensorError, deserialize

    try:
        tensors = deserialize(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise error_in(source, f"not a safetensors file ({type(error).__name__})") from None
    found = {name: (_TYPES.get(of["dtype"], of["dtype"]), tuple(of["shape"])) for name, of in tensors}
    check_facts(found, shapes, source)


def check_facts(found: Mapping[str, Fact], shapes: Shapes, source: str) -> None:
    """Raise ProfileError unless tensors of these types and shapes are what a profile needs."""
    if odd := sorted(found.keys() ^ shapes.keys()):
        what = "is missing" if odd[0] in shapes else "this rule with this kind has no such tensor"
        raise error_in(source, what, odd[0])
    for name, (kind, shape) in found.items():
        if shape != shapes[name]:
            raise error_in(source, f"must have the shape {shapes[name]}, not {shape}", name)
        if kind not in (INTEGERS if name == NEURONS else FLOATS):
            numbers = "whole" if name == NEURONS else "floating-point"
            raise error_in(source, f"must hold {numbers} numbers, not {kind}", name)


def error_in(source: Path | str, what: str, tensor: str = "") -> ProfileError:
    """The error that names the file and, if there is one, the tensor."""
    return ProfileError(sentence(str(source), tensor, what))
