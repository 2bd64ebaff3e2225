"""The skip profile, schema `ffnskip/v1`: these models are the file format, `profiles/schema.json` is made from them.

`python -m ffnskip.profile` prints that schema.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.json_schema import GenerateJsonSchema

from ffnskip import strict_yaml
from ffnskip.errors import ProfileError

HEX_40 = "^[0-9a-f]{40}$"
HEX_64 = "^[0-9a-f]{64}$"
NOT_A_PATH = r"^[^./\\~:][^/\\:]*(/[^./\\~:][^/\\:]*)?$"


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must not hold line breaks or control characters")
    return text


def _sorted(table: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(table.items()))


def _a_list(point: object) -> object:
    if not isinstance(point, (list, tuple)):
        raise ValueError("must be a list of threshold, skip_ratio and kl")
    return point


Text = Annotated[str, Field(max_length=200), AfterValidator(_printable)]
Word = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)]
Name = Annotated[str, Field(max_length=200, pattern=NOT_A_PATH), AfterValidator(_printable)]
Hex40 = Annotated[str, Field(pattern=HEX_40)]
Hex64 = Annotated[str, Field(pattern=HEX_64)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**63 - 1)]
Ratio = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
# A list of the file is a tuple here: only the container is lax, its numbers stay strict.
Cosines = Annotated[tuple[Annotated[float, Field(ge=-1, le=1)], ...], Field(strict=False, max_length=10_000)]
Shares = Annotated[tuple[Ratio, ...], Field(strict=False, max_length=10_000)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelInfo(_Section):
    """The model that the profile was calibrated on and is only valid for."""

    id: Name
    """Name of the model: `org/name`, `demo`, or the bare name of a local folder or file; never a path."""
    revision: Hex40 | None
    """Commit of the model repository, 40 hex digits; null for local files."""
    gguf_sha256: Hex64 | None = None
    """SHA-256 of the GGUF file; null for other formats."""
    model_type: Word
    """`model_type` of the transformers configuration."""
    n_layers: Annotated[int, Field(ge=1, le=10_000)]
    """Number of decoder layers."""
    hidden_size: Positive
    """Width of the residual stream."""
    config_sha256: Hex64
    """SHA-256 of the model's configuration, 64 hex digits."""


class Skip(_Section):
    """When to skip a feed-forward block (FFN): the rule and its numbers."""

    rule: Literal["cosine"]
    """`cosine` is Algorithm 1 of FFN-SkipLLM."""
    cold_s: Count
    """First layer of the skip region; layers before it always run."""
    cold_e: Count
    """End of the skip region (exclusive); this layer and all after it always run."""
    threshold: float
    """Similarity cos(h, h + f) at or above which the FFNs that follow are skipped."""
    warm_up: Count
    """Generated tokens at the start of a sequence that run dense."""
    window: Positive | None = None
    """Most FFNs skipped after a trigger; null: all up to cold_e."""
    refresh_every: Annotated[int, Field(ge=2, le=2**63 - 1)] | None = None
    """Every n-th token runs dense; null: never."""


class Compensation(_Section):
    """What is added to the residual stream in place of a skipped FFN's output."""

    kind: Literal["none"]
    """`none` adds nothing."""


class EvaluationText(_Section):
    """The text that quality was measured on."""

    dataset: Name
    """Name of the dataset: a word or `org/name`, or the bare name of a local file; never a path."""
    config: Text | None
    """Configuration of the dataset, if it has several."""
    split: Text | None
    """Split of the dataset."""
    revision: Text | None
    """Revision of the dataset repository, or null."""
    text_sha256: Hex64
    """SHA-256 of the text that was used, 64 hex digits."""
    tokens_requested: Count
    """Tokens asked for."""
    tokens_used: Count
    """Tokens that the text yielded."""
    sequence_length: Positive
    """Tokens per sequence."""

    @property
    def fell_short(self) -> bool:
        """Whether the text had fewer whole sequences than were asked for."""
        return self.tokens_used < self.tokens_requested // self.sequence_length * self.sequence_length


class CalibrationText(EvaluationText):
    """The text that the similarities were recorded on, and how."""

    seed: Count
    """Seed of the random generator."""
    dtype: Word
    """Precision of the model while calibrating, such as `bfloat16`."""
    on: Literal["text", "generated"]
    """Whether the tokens came from the text or from the model's own generation."""


class SimilarityCurve(_Section):
    """Similarity cos(h, h + f) per layer of the dense model, one value for each layer."""

    mean: Cosines
    """Mean over tokens."""
    low: Cosines
    """10th percentile over tokens."""
    high: Cosines
    """90th percentile over tokens."""


class Measured(_Section):
    """What the profile saved and cost on the evaluation text."""

    target_ratio: Ratio
    """The skip_ratio that was asked for."""
    skip_ratio: Ratio
    """Skipped FFNs / (layers x tokens past warm-up)."""
    flops_saved: Annotated[float, Field(le=1)]
    """Fraction of the dense decode's FLOPs that was saved, all overhead charged; negative if it cost more."""
    never_skip_fraction: Ratio
    """Tokens past warm-up in which no FFN was skipped / tokens past warm-up."""
    perplexity_dense: NotNegative
    """Perplexity of the dense model."""
    perplexity: NotNegative
    """Perplexity with the profile."""
    kl: float
    """Mean KL divergence of the profile's predictions from the dense model's, nats per token."""
    top1_agreement: Ratio
    """Fraction of tokens at which both models rank the same token first."""
    tokens: Count
    """Tokens that the figures are taken over."""
    standard_error: Annotated[dict[Word, NotNegative], AfterValidator(_sorted)]
    """Standard error of a figure, by the name of its field."""
    verdict: Annotated[str, Field(max_length=300), AfterValidator(_printable)]
    """One sentence that says whether the profile is worth using."""
    within_budget: bool
    """Whether kl and top1_agreement are within the quality budget that the verdict states."""
    first_skipped: Shares | None = None
    """Share of tokens whose first skipped FFN is this layer's, one value per layer."""


class CurvePoint(NamedTuple):
    """Threshold, the skip_ratio it gives, and the KL divergence in nats per token it costs."""

    threshold: float
    skip_ratio: Annotated[float, Field(ge=0, le=1)]
    kl: float


class Profile(_Section):
    """Which feed-forward blocks of one model to skip, what that was calibrated on, and what it cost."""

    schema_version: Literal["ffnskip/v1"] = Field(alias="schema")
    """Version of this file format."""
    model: ModelInfo
    skip: Skip
    compensation: Compensation
    calibration: CalibrationText | None = None
    evaluation: EvaluationText | None = None
    similarity: SimilarityCurve | None = None
    measured: Measured | None = None
    curve: Annotated[
        tuple[Annotated[CurvePoint, BeforeValidator(_a_list)], ...], Field(strict=False, max_length=1000)
    ] = ()
    """Other thresholds, to move the ratio without a new calibration: lists of threshold, skip_ratio and kl."""
    made_with: Annotated[dict[Word, Word], AfterValidator(_sorted)]
    """Versions of the software, by package name."""

    def with_threshold(self, threshold: float) -> "Profile":
        """The same profile with another threshold."""
        return self.model_copy(update={"skip": self.skip.model_copy(update={"threshold": threshold})})

    @model_validator(mode="after")
    def _sections_agree(self) -> "Profile":
        n_layers, skip = self.model.n_layers, self.skip
        if skip.cold_e > n_layers:
            raise ValueError(f"skip.cold_e: must be at most model.n_layers ({n_layers}), not {skip.cold_e}")
        if skip.cold_s >= skip.cold_e:
            raise ValueError(f"skip.cold_s: must be less than skip.cold_e ({skip.cold_e}), not {skip.cold_s}")
        per_layer = {f"similarity.{name}": values for name, values in self.similarity or ()}
        if self.measured and self.measured.first_skipped is not None:
            per_layer["measured.first_skipped"] = self.measured.first_skipped
        for name, values in per_layer.items():
            if len(values) != n_layers:
                raise ValueError(f"{name}: must hold {n_layers} numbers, one per layer, not {len(values)}")
        return self


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Read a profile from a file; raises ProfileError, and nothing else, for a file that is missing or wrong."""
    source = os.fspath(path)
    try:
        with open(source, "rb") as file:
            data = file.read(strict_yaml.MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ProfileError(strict_yaml.sentence(source, "", f"cannot be read ({_reason(error)})")) from None
    return parse_profile(data, source)


def parse_profile(data: bytes | str, source: str = "profile") -> Profile:
    """Read a profile from YAML; raises ProfileError, and nothing else, with `source: dotted.field: what is wrong`."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    tree = strict_yaml.load(data, source)
    try:
        return Profile.model_validate(tree)
    except ValidationError as error:
        raise ProfileError(_first_error(error, source)) from None


def dump_profile(profile: Profile) -> str:
    """Write a profile as YAML: equal profiles give the same text, and parsing it gives the profile back.

    Raises ProfileError for a profile that would be too large to load.
    """
    tree = profile.model_dump(mode="json", by_alias=True)
    sections = {key: value for key, value in tree.items() if value is not None and value != []}
    text = "# A skip profile for ffnskip.\n" + strict_yaml.dump(sections)
    if len(text.encode()) > strict_yaml.MAX_BYTES:
        raise ProfileError(f"the profile is larger than {strict_yaml.MAX_BYTES // 1024} KiB; shorten its curve")
    return text


def save_profile(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Write a profile to a file, making its folder; the file is complete or untouched, never half written."""
    target = Path(path)
    data = dump_profile(profile).encode()
    try:
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise ProfileError(strict_yaml.sentence(str(target), "", f"cannot be written ({_reason(error)})")) from None


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a profile, as checked in under `profiles/schema.json`."""
    return {"$schema": GenerateJsonSchema.schema_dialect, **Profile.model_json_schema()}


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
}


def _first_error(error: ValidationError, source: str) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    kind = first.get("ctx", {}).get("pattern") or first["type"]
    _, _, rule = first["msg"].partition(" should ")
    what = _MESSAGES.get(kind) or (f"must {rule}" if rule else first["msg"].removeprefix("Value error, "))
    value = first["input"]
    if kind not in ("missing", "extra_forbidden") and not isinstance(value, (dict, list, tuple)):
        what += f", not {strict_yaml.one_line(json.dumps(value, ensure_ascii=False), 60)}"
    return strict_yaml.sentence(source, where, what)


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or "not a file name"


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
