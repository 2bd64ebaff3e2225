"""The sections of a skip profile, which are the file format, and what is wrong with one in a sentence.

`ffnskip.profiles.profile` puts them together.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from ffnskip.compensation.kinds import KINDS
from ffnskip.profiles import strict_yaml
from ffnskip.rules import Rule, rule_named, rule_names

MOST_LAYERS = 10_000
HEX_40 = "^[0-9a-f]{40}$"
HEX_64 = "^[0-9a-f]{64}$"
NOT_A_PATH = r"^[^./\\~:][^/\\:]*(/[^./\\~:][^/\\:]*)?$"
WEIGHTS_FILE = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors$"

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


def printable(text: str) -> str:
    """Refuse what could forge lines or move a terminal's cursor."""
    if not text.isprintable():
        raise ValueError("must not hold line breaks or control characters")
    return text


def sort_keys(table: dict[str, Any]) -> dict[str, Any]:
    """So that equal tables are written alike."""
    return dict(sorted(table.items()))


def _a_rule(name: str) -> str:
    if name not in rule_names():
        raise ValueError(f"must be {' or '.join(map(repr, rule_names()))}")
    return name


RuleName = Annotated[str, AfterValidator(_a_rule), WithJsonSchema({"enum": [*rule_names()], "type": "string"})]
Text = Annotated[str, Field(max_length=200), AfterValidator(printable)]
Word = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(printable)]
Name = Annotated[str, Field(max_length=200, pattern=NOT_A_PATH), AfterValidator(printable)]
Hex40 = Annotated[str, Field(pattern=HEX_40)]
Hex64 = Annotated[str, Field(pattern=HEX_64)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**63 - 1)]
Ratio = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
# A list of the file is a tuple here: only the container is lax, its numbers stay strict.
Cosines = Annotated[tuple[Annotated[float, Field(ge=-1, le=1)], ...], Field(strict=False, max_length=10_000)]
Shares = Annotated[tuple[Ratio, ...], Field(strict=False, max_length=10_000)]


class Section(BaseModel):
    """A mapping of the file: no unknown keys, no conversions, no infinities, and frozen once read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelInfo(Section):
    """The model that the profile was calibrated on and is only valid for."""

    id: Name
    """Name of the model: `org/name`, `demo`, or the bare name of a local folder or file; never a path."""
    revision: Hex40 | None
    """Commit of the model repository, 40 hex digits; null for local files."""
    gguf_sha256: Hex64 | None = None
    """SHA-256 of the GGUF file; null for other formats."""
    model_type: Word
    """`model_type` of the transformers configuration."""
    n_layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    """Number of decoder layers."""
    hidden_size: Positive
    """Width of the residual stream."""
    config_sha256: Hex64
    """SHA-256 of the model's architecture, 64 hex digits."""
    weights_sha256: Hex64 | None = None
    """Fingerprint of the model's weights, and of what of its configuration they do not show (rope, windows, caps), 64
    hex digits; null in profiles that were made before there was one."""


class Skip(Section):
    """When to skip a feed-forward block (FFN): the rule and its numbers."""

    rule: RuleName
    """`cosine` is Algorithm 1 of FFN-SkipLLM; with `predicted-damage` every layer decides alone; `price` leaves out
    parts of FFNs and attention."""
    cold_s: Count
    """First layer of the skip region; layers before it always run."""
    cold_e: Count
    """End of the skip region (exclusive); this layer and all after it always run."""
    threshold: float
    """`cosine`: similarity cos(h, h + f) at or above which the FFNs that follow are skipped. `predicted-damage`: nats
    per skipped FFN under which it is skipped. `price`: nats per FLOP under which a part is left out."""
    warm_up: Count
    """Generated tokens at the start of a sequence that run dense."""
    window: Positive | None = None
    """Most FFNs skipped after a trigger; null: all up to cold_e."""
    refresh_every: Annotated[int, Field(ge=2, le=2**63 - 1)] | None = None
    """Every n-th token runs dense; null: never."""

    @property
    def by(self) -> Rule:
        """The rule itself."""
        return rule_named(self.rule)

    @model_validator(mode="after")
    def _rule_agrees(self) -> "Skip":
        self.by.refuse(self)
        return self


class Parts(Section):
    """The parts that the rule `price` may leave out: inputs of the matrices of one layer."""

    attention_input: Positive
    """Inputs of query, key and value projection."""
    attention_output: Positive
    """Inputs of attention's output projection."""
    ffn_input: Positive
    """Inputs of gate and up projection."""
    neurons: Positive
    """Neurons of the FFN, the inputs of its down projection."""


class Compensation(Section):
    """What is added to the residual stream in place of a skipped FFN's output."""

    kind: Literal["none", "mean", "linear", "low-rank"]
    """`none` adds nothing; `mean` the FFN's mean output; `linear` and `low-rank` an affine map of the FFN's input."""
    rank: Positive | None = None
    """Rank of a `low-rank` map."""
    neurons: Count = 0
    """How many of the FFN's own neurons are run beside a `linear` or `low-rank` map."""
    file: Annotated[str, Field(max_length=100, pattern=WEIGHTS_FILE)] | None = None
    """Name of the safetensors file with the weights, in the profile's own folder; null where none are needed."""
    sha256: Hex64 | None = None
    """SHA-256 of that file, 64 hex digits."""

    @model_validator(mode="after")
    def _kind_agrees(self) -> "Compensation":
        if (self.rank is not None) != KINDS[self.kind].has_rank:
            raise ValueError("rank belongs to the kind low-rank: give it there and nowhere else")
        if self.neurons and not KINDS[self.kind].reads_input:
            raise ValueError("neurons belong to the kinds linear and low-rank")
        if (self.file is None) != (self.sha256 is None):
            raise ValueError("file and sha256 belong together")
        return self


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
