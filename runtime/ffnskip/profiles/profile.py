"""The skip profile, schema `ffnskip/v1`: these models are the file format, `profiles/schema.json` is made from them.

`python -m ffnskip.profiles` prints that schema.
"""

import math
import os
from bisect import bisect_left
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, model_validator
from pydantic.json_schema import GenerateJsonSchema

from ffnskip.compensation.kinds import tensor_shapes
from ffnskip.errors import FfnskipError, ProfileError
from ffnskip.files import read_regular, replacing
from ffnskip.profiles import strict_yaml
from ffnskip.profiles.evidence import (
    CalibrationText,
    Curve,
    CurvePoint,
    EvaluationText,
    Fit,
    Measured,
    Search,
    SimilarityCurve,
)
from ffnskip.profiles.locate import locate
from ffnskip.profiles.schema import Compensation, ModelInfo, Parts, Section, Skip, Word, first_error, sort_keys
from ffnskip.profiles.weights_file import check_header, read_weights_file, weights_named_in

if TYPE_CHECKING:
    from ffnskip.profiles.weights import Weights


class Profile(Section):
    """Which feed-forward blocks of one model to skip, what that was calibrated on, and what it cost."""

    schema_version: Literal["ffnskip/v1"] = Field(alias="schema")
    """Version of this file format."""
    model: ModelInfo
    skip: Skip
    compensation: Compensation
    parts: Parts | None = None
    calibration: CalibrationText | None = None
    evaluation: EvaluationText | None = None
    similarity: SimilarityCurve | None = None
    search: Search | None = None
    fit: Fit | None = None
    measured: Measured | None = None
    curve: Curve = ()
    """Other thresholds, to move the ratio without a new calibration: lists of threshold, skip_ratio and kl."""
    made_with: Annotated[dict[Word, Word], AfterValidator(sort_keys)]
    """Versions of the software, by package name."""

    _weights: "Weights | None" = PrivateAttr(default=None)

    @property
    def weights(self) -> "Weights | None":
        """The numbers of probe and compensation, which lie in a file beside the profile's; None if not loaded."""
        return self._weights

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that those must be; empty where rule and compensation need none."""
        hidden, layers = self.model.hidden_size, self.skip.cold_e - self.skip.cold_s
        of_a_layer = self.skip.by.tensors(hidden, self.part_widths) | tensor_shapes(self.compensation, hidden)
        return {name: (layers, *shape) for name, shape in of_a_layer.items()}

    @property
    def part_widths(self) -> dict[str, int]:
        """How many parts of each role a layer has (`ffnskip.model.parts`); empty where none is left out."""
        return {} if self.parts is None else self.parts.model_dump()

    @property
    def deciding(self) -> list[object]:
        """All that decides what is skipped and what is added instead, as plain data."""
        return [self.skip.model_dump(), self.compensation.sha256]

    @property
    def never(self) -> "Profile":
        """The same profile with a threshold at which the rule runs and nothing is skipped."""
        return self.with_threshold(self.skip.by.never)

    def with_weights(self, weights: "Weights") -> "Profile":
        """The same profile with these weights, whose file it then names.

        Raises:
            ProfileError: they do not fit rule and compensation.
        """
        from ffnskip.profiles.weights import check_weights

        check_weights(weights, self.weight_shapes, "The weights")
        named = {"file": weights.file_name, "sha256": weights.sha256}
        profile = self.model_copy(update={"compensation": self.compensation.model_copy(update=named)})
        profile._weights = weights
        return profile

    def with_region(self, cold_s: int, cold_e: int) -> "Profile":
        """The same profile for a part of its skip region, with the weights of that part."""
        kept = slice(cold_s - self.skip.cold_s, cold_e - self.skip.cold_s)
        profile = self.with_skip(cold_s=cold_s, cold_e=cold_e)
        if self._weights is None:
            return profile
        tensors = {name: tensor[kept] for name, tensor in self._weights.tensors.items()}
        return profile.with_weights(replace(self._weights, tensors=tensors))

    def refuse_missing_weights(self) -> None:
        """Raise ProfileError if the profile needs weights that were not loaded with it."""
        if self.weight_shapes and self._weights is None:
            raise ProfileError("The profile came without its weights: read it from its file, with the weights beside.")

    def with_skip(self, **settings: Any) -> "Profile":
        """The same profile with other settings of its rule, which are not checked."""
        return self.model_copy(update={"skip": self.skip.model_copy(update=settings)})

    def with_threshold(self, threshold: float) -> "Profile":
        """The same profile with another threshold; what it says under `measured` stays that of the old one."""
        return self.with_skip(threshold=threshold)

    def at_ratio(self, ratio: float) -> "Profile":
        """The same profile with the threshold that its curve has at another skip_ratio, as `point_at` finds it."""
        return self.with_threshold(self.point_at(ratio).threshold)

    @property
    def curve_by_ratio(self) -> list[CurvePoint]:
        """The curve in rising order; of points with one ratio the threshold that skips less comes first."""
        strictness = self.skip.by.strictness
        return sorted(self.curve, key=lambda point: (point.skip_ratio, -strictness(point.threshold)))

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
        points = self.curve_by_ratio
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
            FfnskipError: both are given, the threshold is one that the rule cannot have, or the target is not on the
                curve.
        """
        if threshold is not None and target is not None:
            raise FfnskipError("Give a threshold or a target, not both.")
        if target is not None:
            return self.at_ratio(target)
        if threshold is None:
            return self
        if not math.isfinite(threshold):
            raise FfnskipError(f"The threshold must be a finite number, not {threshold}.")
        if threshold < (rule := self.skip.by).least:
            raise FfnskipError(f"The threshold of {rule.name} is a number of {rule.unit} and not {threshold}.")
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
        if (self.parts is not None) != skip.by.leaves_out_parts:
            raise ValueError("parts: belongs to the rule price: give it there and nowhere else")
        if self.parts is not None and self.compensation.kind != "none":
            raise ValueError(
                "compensation.kind: the rule price skips no FFN as a whole, so nothing is added: write none"
            )
        if self.compensation.file is not None and not self.weight_shapes:
            raise ValueError("compensation.file: this rule with this kind needs no file, but one is named")
        return self


def load_profile(path: str | os.PathLike[str], *, with_weights: bool = True) -> Profile:
    """Read a profile and its weights from files.

    Args:
        path: the YAML file, here or on the Hugging Face Hub, by a name as `ffnskip.profiles.locate` takes it:
            `hf://org/repo/file.yaml@revision`, or `org/repo` of a repository with one profile.
        with_weights: False only checks that the weights are there, unaltered and of the right shapes, which takes no
            torch.

    Raises:
        ProfileError: and nothing else, for a file that is missing or wrong.
        FfnskipError: the Hub does not give it.
    """
    located = locate(path)
    source = located.name
    try:
        data = read_regular(located.path, strict_yaml.MAX_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ProfileError(strict_yaml.sentence(source, "", f"cannot be read ({_reason(error)})")) from None
    if data is None:
        raise ProfileError(strict_yaml.sentence(source, "", strict_yaml.TOO_LARGE))
    profile = parse_profile(data, source)
    name, sha256 = profile.compensation.file, profile.compensation.sha256
    if name is not None and sha256 is not None:
        weights_path = located.beside(name)
        if not with_weights:
            data = read_weights_file(weights_path, sha256, profile.weight_shapes)
            check_header(data, profile.weight_shapes, str(weights_path))
            return profile
        from ffnskip.profiles.weights import load_weights

        profile._weights = load_weights(weights_path, sha256, profile.weight_shapes)
    return profile


def parse_profile(data: bytes | str, source: str = "profile") -> Profile:
    """Read a profile, without weights, from YAML.

    Raises ProfileError, and nothing else, with `source: dotted.field: what is wrong`.
    """
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    tree = strict_yaml.load(data, source)
    try:
        profile = Profile.model_validate(tree)
    except ValidationError as error:
        raise ProfileError(first_error(error, source)) from None
    if profile.weight_shapes and profile.compensation.file is None:
        message = "this rule with this kind needs a file, but none is named"
        raise ProfileError(strict_yaml.sentence(source, "compensation.file", message))
    return profile


def dump_profile(profile: Profile) -> str:
    """Write a profile as YAML: equal profiles give the same text, and parsing it gives the profile back.

    Raises ProfileError for a profile that would be too large to load.
    """
    tree = profile.model_dump(mode="json", by_alias=True)
    sections = {key: value for key, value in tree.items() if value is not None and value != []}
    sections["compensation"] = {key: value for key, value in tree["compensation"].items() if value}
    text = "# A skip profile for ffnskip.\n" + strict_yaml.dump(sections)
    if len(text.encode()) > strict_yaml.MAX_BYTES:
        raise ProfileError(f"the profile is larger than {strict_yaml.MAX_BYTES // 1024} KiB; shorten its curve")
    return text


def save_profile(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Write a profile, and its weights beside it, making the folder; a file is complete or untouched, never half.

    The weights of a profile that is written over go with it, unless another profile of the folder names them, too.
    """
    target = Path(path)
    profile.refuse_missing_weights()
    if profile.weights is not None:  # it may have been read from a file of another name
        profile = profile.with_weights(profile.weights)
    data = dump_profile(profile).encode()
    before = weights_named_in(target)
    try:
        if profile.weights is not None:  # first, so that no profile ever names a file that is not there
            with replacing(target.with_name(profile.weights.file_name)) as temporary:
                temporary.write_bytes(profile.weights.data)
        with replacing(target) as temporary:
            temporary.write_bytes(data)
        for name in before.difference(*map(weights_named_in, [target, *target.parent.glob("*.y*ml")])):
            target.with_name(name).unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise ProfileError(strict_yaml.sentence(str(target), "", f"cannot be written ({_reason(error)})")) from None


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a profile, as checked in under `profiles/schema.json`."""
    return {"$schema": GenerateJsonSchema.schema_dialect, **Profile.model_json_schema()}


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or "not a file name"
