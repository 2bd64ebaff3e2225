"""Put a profile on a Hugging Face model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, get_args

from ffnskip.errors import FfnskipError
from ffnskip.fast.fused_forward import FusedForward, PathName
from ffnskip.general.self_check import self_check
from ffnskip.general.walk import Mode
from ffnskip.general.wrap import Applied, refuse_second_profile
from ffnskip.profiles.identity import check_identity, shared_profile
from ffnskip.profiles.locate import is_auto
from ffnskip.profiles.profile import Profile, load_profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply(
    model: PreTrainedModel,
    profile: Profile | str | os.PathLike[str],
    *,
    mode: Mode = "decode",
    threshold: float | None = None,
    target: float | None = None,
    path: PathName | None = None,
    check: bool = True,
    other_weights: bool = False,
) -> Applied:
    """Make `model` skip FFN blocks as `profile` says, in place.

    >>> with ffnskip.apply(model, "profile.yaml") as applied:
    ...     model.generate(**inputs)
    ...     print(applied.stats.skip_ratio)

    Args:
        model: a Hugging Face decoder. For a fused step its weights are laid out anew in memory, and are still its own.
        profile: a profile, the path of one or its name on the Hugging Face Hub as in `ffnskip.load_profile`, or
            `auto`: of those that come with ffnskip and fit the model, the best one within the quality budget.
        mode: `decode` for generation: the prompt and the first `warm_up` generated tokens run dense.
            `model.generate` says what is prompt. In a loop of one's own it is what goes through the model before the
            first pass over a single token, and again every later pass over several tokens: speculative decoding by
            hand hardly skips, and a prompt should not be fed in chunks that end with a single token. `score` for full
            forward passes: every position from `warm_up` on may skip, as if it had been generated.
        threshold: replaces the profile's.
        target: replaces the profile's threshold by the one that its curve has at this skip_ratio.
        path: `fused` or `general`: whether passes over a single token of each sequence run a fused step
            (`ffnskip.fast.fused_forward`) or the model's own forward pass, as most others do. None is `fused` where
            there is a step for the model, and `general` in score mode.
        check: prove on the model itself, with a few short forward passes, that the profile does what it says.
        other_weights: take a profile that was made on other weights of the same architecture, such as another
            fine-tune's, an adapter's or those of a coarser GGUF file. What it costs is then to be measured.

    Raises:
        ProfileError: the profile cannot be read or belongs to another model.
        FfnskipError: the mode is unknown, the threshold is not one of the rule's, the target is off the curve, or both
            are given.
        UnsupportedModelError: the model's FFNs cannot be wrapped, or the self-check failed.

    Warns:
        FfnskipWarning: no token was allowed to skip until the profile was taken off, and why.
    """
    if mode not in get_args(Mode):
        raise FfnskipError(f"The mode must be one of {', '.join(get_args(Mode))}, not {mode!r}.")
    if path not in (*get_args(PathName), None):
        raise FfnskipError(f"The path must be one of {', '.join(get_args(PathName))}, not {path!r}.")
    profile = fitting(model, profile, threshold=threshold, target=target, check=check, other_weights=other_weights)
    fused = None
    if path == "fused" or (path is None and mode == "decode"):
        fused = FusedForward(model, profile, only=path == "fused", check=check)
    return Applied(model, profile, mode, warns=True, fused=fused)


def accelerate(model: PreTrainedModel, *, check: bool = True) -> FusedForward:
    """Make `model` decode by a fused step, densely, in place.

    >>> with ffnskip.accelerate(model):
    ...     model.generate(**inputs)

    Args:
        model: a Hugging Face decoder. Its weights are laid out anew, and are still its own.
        check: compare a few steps with the model's own forward pass first.

    Raises:
        FfnskipError: the model is accelerated, or has a profile on, already.
        UnsupportedModelError: there is no fused step for it.
    """
    refuse_second_profile(model)
    return FusedForward(model, None, only=True, check=check).install()


def fitting(
    model: PreTrainedModel,
    profile: Profile | str | os.PathLike[str],
    *,
    threshold: float | None,
    target: float | None,
    check: bool,
    other_weights: bool,
) -> Profile:
    """The profile with the threshold asked for, once it is known to fit the model; see `apply`."""
    if not isinstance(profile, Profile):
        profile = load_profile(shared_profile(model) if is_auto(profile) else profile)
    profile.refuse_missing_weights()
    refuse_second_profile(model)
    check_identity(profile, model, other_weights=other_weights)
    profile = profile.moved(threshold=threshold, target=target)
    if check:
        self_check(model, profile)
    return profile
