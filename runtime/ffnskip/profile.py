"""The skip profile, schema `ffnskip/v1`: these models are the file format, `profiles/schema.json` is made from them.

`python -m ffnskip.profile` prints that schema.
"""

import json
import math
import os
from bisect import bisect_left
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic.json_schema import GenerateJsonSchema

from ffnskip import strict_yaml
from ffnskip.atomic import replacing
from ffnskip.errors import FfnskipError, ProfileError
from ffnskip.sections import (
    HEX_40,
    HEX_64,
    NOT_A_PATH,
    CalibrationText,
    Compensation,
    Curve,
    CurvePoint,
    EvaluationText,
    Measured,
    ModelInfo,
    Search,
    Section,
    SimilarityCurve,
    Skip,
    Word,
    sort_keys,
)


class Profile(Section):
    """Which feed-forward blocks of one model to skip, what that was calibrated on, and what it cost."""

    schema_version: Literal["ffnskip/v1"] = Field(alias="schema")
    """Version of this file format."""
    model: ModelInfo
    skip: Skip
    compensation: Compensation
    calibration: CalibrationText | None = None
    evaluation: EvaluationText | None = None
    similarity: SimilarityCurve | None = None
    search: Search | None = None
    measured: Measured | None = None
    curve: Curve = ()
    """Other thresholds, to move the ratio without a new calibration: lists of threshold, skip_ratio and kl."""
    made_with: Annotated[dict[Word, Word], AfterValidator(sort_keys)]
    """Versions of the software, by package name."""

    def with_threshold(self, threshold: float) -> "Profile":
        """The same profile with another threshold; what it says under `measured` stays that of the old one."""
        return self.model_copy(update={"skip": self.skip.model_copy(update={"threshold": threshold})})

    def at_ratio(self, ratio: float) -> "Profile":
        """The same profile with the threshold that its curve has at another skip_ratio, as `point_at` finds it."""
        return self.with_threshold(self.point_at(ratio).threshold)

    def point_at(self, ratio: float) -> CurvePoint:
        """The point at this skip_ratio of the curve, between whose points threshold and kl are taken to be linear.

        Raises:
            FfnskipError: the ratio is not finite or beyond the curve's ends, or the curve has fewer than two points.
        """
        if not math.isfinite(ratio):
            raise FfnskipError(f"The target ratio must be a finite number, not {ratio}.")
        if len(self.curve) < 2:
            raise FfnskipError(
                "The profile's curve has fewer than two points to move between: calibrate for that target instead."
            )
        # Of points with one ratio the higher threshold comes first, so that thresholds fall all along.
        points = sorted(self.curve, key=lambda point: (point.skip_ratio, -point.threshold))
        first, last = points[0].skip_ratio, points[-1].skip_ratio
        if not first <= ratio <= last:
            raise FfnskipError(
                f"The profile's curve goes from ratio {first} to {last}, not to {ratio}: "
                "calibrate for that target instead."
            )
        index = bisect_left(points, ratio, key=lambda point: point.skip_ratio)
        above = points[index]
        if above.skip_ratio == ratio:
            return above
        below = points[index - 1]
        share = (ratio - below.skip_ratio) / (above.skip_ratio - below.skip_ratio)
        threshold, _, kl = ((1 - share) * low + share * high for low, high in zip(below, above, strict=True))
        return CurvePoint(threshold, ratio, kl)

    def moved(self, *, threshold: float | None = None, target: float | None = None) -> "Profile":
        """The same profile with this threshold, or at this ratio of its curve, or as it is if neither is given.

        Raises:
            FfnskipError: both are given, the threshold is not finite, or the target is not on the curve.
        """
        if threshold is not None and target is not None:
            raise FfnskipError("Give a threshold or a target, not both.")
        if target is not None:
            return self.at_ratio(target)
        if threshold is None:
            return self
        if not math.isfinite(threshold):
            raise FfnskipError(f"The threshold must be a finite number, not {threshold}.")
        return self.with_threshold(threshold)

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
        with replacing(target) as temporary:
            temporary.write_bytes(data)
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
    from ffnskip import profile  # pydantic finds the docstrings of imported modules only

    print(json.dumps(profile.json_schema(), indent=2, ensure_ascii=False))
