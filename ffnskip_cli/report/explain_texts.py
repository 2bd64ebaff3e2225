"""The texts of a profile in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ffnskip.profiles.profile import Profile
    from ffnskip.profiles.schema import CalibrationText, EvaluationText, NamedText


def text_name(text: EvaluationText) -> str:
    """`dataset:config:split` of a text, or those of a mixture's parts."""
    if not text.parts:
        return _name(text)
    return f"a mixture of {listed([_name(part) for part in text.parts])}"


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def unseen(profile: Profile) -> bool:
    """Whether the profile says that it was measured on another text than it was calibrated on."""
    calibration, evaluation = profile.calibration, profile.evaluation
    return bool(calibration and evaluation and calibration.text_sha256 != evaluation.text_sha256)


def explain_texts(profile: Profile) -> str | None:
    """What the profile was calibrated and measured on, and whether that is text of one kind."""
    calibration, evaluation = profile.calibration, profile.evaluation
    if calibration and evaluation:
        kinds = _kinds(profile, calibration, evaluation)
        return f"It was calibrated on {_recorded(calibration)} and measured on {_counted(evaluation)}: {kinds}."
    if calibration:
        return f"It was calibrated on {_recorded(calibration)}."
    if evaluation:
        return f"It was measured on {_counted(evaluation)}."
    return None


def kinds_of(text: EvaluationText) -> set[tuple[str, str | None]]:
    """The datasets and configurations of a text: equal sets are text of the same kinds."""
    return {(part.dataset, part.config) for part in text.parts or (text,)}


def _kinds(profile: Profile, calibration: EvaluationText, evaluation: EvaluationText) -> str:
    if not unseen(profile):
        return "the very same text, so the figures are not those of unseen text"
    a, b = kinds_of(calibration), kinds_of(evaluation)
    if a == b:
        kinds = "the same kinds of text" if len(a) > 1 else "text of one kind"
        return f"{kinds}, so the figures say nothing about others"
    if {dataset for dataset, _ in a} & {dataset for dataset, _ in b}:
        return "texts that share a dataset only in part"
    return "text of another kind"


def _recorded(text: CalibrationText) -> str:
    if text.on == "generated":
        return f"what the model itself wrote on from {text_name(text)}"
    return _counted(text)


def _counted(text: EvaluationText) -> str:
    if not text.parts:
        return f"{text.tokens_used:,} tokens of {_name(text)}"
    parts = [f"{_name(part)} ({part.tokens_used:,})" for part in text.parts]
    return f"{text.tokens_used:,} tokens of a mixture of {listed(parts)}"


def _name(text: NamedText) -> str:
    return ":".join(filter(None, (text.dataset, text.config, text.split)))
