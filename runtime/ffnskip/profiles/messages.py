"""What is wrong with a profile, in one sentence that names the field."""

import json

from pydantic import ValidationError

from ffnskip.profiles import strict_yaml
from ffnskip.profiles.schema import HEX_40, HEX_64, NOT_A_PATH, WEIGHTS_FILE

_MESSAGES = {
    "missing": "is missing; add it",
    "extra_forbidden": "is not a key of a profile; remove it or correct its spelling",
    "model_type": "must be a mapping",
    "dict_type": "must be a mapping",
    "tuple_type": "must be a list",
    "string_type": "must be text in quotes",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    HEX_40: "must be 40 lower-case hex digits in quotes",
    HEX_64: "must be 64 lower-case hex digits in quotes",
    NOT_A_PATH: "must be a name such as wikitext or org/name, never a path",
    WEIGHTS_FILE: "must be the bare name of a .safetensors file in the profile's own folder",
}


def first_error(error: ValidationError, source: str) -> str:
    """The first of pydantic's errors as `source: dotted.field: what is wrong`."""
    first, *others = error.errors(include_url=False)
    where = ".".join(str(part) for part in first["loc"])
    kind = first.get("ctx", {}).get("pattern") or first["type"]
    _, _, rule = first["msg"].partition(" should ")
    what = _MESSAGES.get(kind) or (f"must {rule}" if rule else first["msg"].removeprefix("Value error, "))
    value = first["input"]
    if kind not in ("missing", "extra_forbidden") and not isinstance(value, (dict, list, tuple)):
        what += f", not {strict_yaml.one_line(json.dumps(value, ensure_ascii=False), 60)}"
    unknown = [e["loc"][-1] for e in others if e["type"] == "extra_forbidden" and e["loc"][:-1] == first["loc"][:-1]]
    if kind == "missing" and unknown:
        what = f"is missing, and {strict_yaml.one_line(str(unknown[0]), 60)} is no key here: correct its spelling"
    return strict_yaml.sentence(source, where, what)
