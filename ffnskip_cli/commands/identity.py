"""Whether a profile was made on the weights at hand, and what it costs on others."""

from __future__ import annotations

from ffnskip.errors import FfnskipError, ProfileError
from ffnskip.profiles.identity import model_info, refuse_other_architecture, refuse_other_weights
from ffnskip.profiles.profile import Profile
from ffnskip_cli import console
from ffnskip_cli.measure.quality import measure_quality
from ffnskip_cli.sources.models import LoadedModel
from ffnskip_cli.text.named import dataset_names, evaluation_text, text_names

_TOKENS, _LONGEST = 1024, 256  # of the text that other weights are measured on, and of a sequence of it


def check_identity(loaded: LoadedModel, profile: Profile, *, other_weights: bool, offline: bool) -> None:
    """Refuse a profile of other weights; with `other_weights` measure instead what it costs on these, and say so.

    Raises:
        ProfileError: the profile was made for another architecture, or on other weights.
    """
    found = model_info(loaded.model, id=loaded.id, revision=loaded.revision, gguf_sha256=loaded.gguf_sha256)
    refuse_other_architecture(profile, found)
    try:
        refuse_other_weights(profile, found)
    except ProfileError:
        if not other_weights:
            raise
        _say_cost(loaded, profile, offline)


def _say_cost(loaded: LoadedModel, profile: Profile, offline: bool) -> None:
    try:
        kl, tokens, name = _measure(loaded, profile, offline)
    except FfnskipError as error:
        console.warn(f"The profile was made on other weights, and what it costs on these is not known: {error}")
        return
    promised = "" if profile.measured is None else f", where the profile promises {profile.measured.kl:.3f}"
    console.warn(
        f"The profile was made on other weights. On these it costs KL {kl:.3f} nats per token{promised} "
        f"(over {tokens} tokens of {name})."
    )


def _measure(loaded: LoadedModel, profile: Profile, offline: bool) -> tuple[float, int, str]:
    """KL on a little of the text that the profile was measured on, how many tokens those are, and what text."""
    text, calibration = profile.evaluation, profile.calibration
    if text is None:
        raise FfnskipError("The profile does not say what text it was measured on.")
    with console.busy("Preparing text"):
        corpus = evaluation_text(
            loaded,
            text_names(text),
            calibrated_on=dataset_names(calibration) if calibration else (),
            tokens=_TOKENS,
            sequence_length=min(text.sequence_length, _LONGEST),
            seed=calibration.seed if calibration else 0,
            offline=offline,
        )
    (quality,) = measure_quality(loaded.model, [profile], corpus.tokens, console.track)
    return quality.kl.mean, corpus.tokens_used, text.dataset
