"""Which model a profile belongs to: its architecture and its weights, hashed so that they travel.

`config_sha256` covers what the architecture is made of, and nothing that depends on the version of transformers or on
the container: a model read from the Hub, from a folder and from a GGUF file has one and the same. `weights_sha256`
(`ffnskip.profiles.fingerprint`) tells apart models of one architecture: another fine-tune, another quantization, or
another rotary embedding.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import TYPE_CHECKING, Any

import torch

from ffnskip.errors import FfnskipError, FfnskipWarning, ProfileError
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.fingerprint import weights_sha256
from ffnskip.profiles.locate import Located, locate_all, shared_profiles
from ffnskip.profiles.profile import Profile, load_profile
from ffnskip.profiles.schema import ModelInfo

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_ARCHITECTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "tie_word_embeddings",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_inner",
)


def config_sha256(config: PreTrainedConfig) -> str:
    """Hash of the architecture, 64 hex digits. Floats count to five digits: GGUF stores 1e-5 as 9.99999975e-6."""
    text_config = config.get_text_config()
    facts: dict[str, Any] = {name: _fact(text_config, name) for name in _ARCHITECTURE}
    facts["head_dim"] = head_dim(text_config)
    facts["rope_theta"] = (getattr(text_config, "rope_parameters", None) or {}).get("rope_theta")
    rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in facts.items() if v is not None}
    return hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()


def _fact(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' word for what varies between layers
        return None


def head_dim(config: PreTrainedConfig) -> int | None:
    """Channels per attention head; many configurations leave it to be derived, and it may vary between layers."""
    try:
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    except (AttributeError, RuntimeError):  # there is no attention, or it varies
        return None


def model_info(
    model: PreTrainedModel, *, id: str, revision: str | None = None, gguf_sha256: str | None = None
) -> ModelInfo:
    """What a profile says about the model it was made on. `id` and `revision` are the caller's knowledge."""
    described = architecture(model.config, id=id, revision=revision, gguf_sha256=gguf_sha256)
    return described.model_copy(update={"n_layers": len(ffn_sites(model)), "weights_sha256": weights_sha256(model)})


def architecture(
    config: PreTrainedConfig, *, id: str, revision: str | None = None, gguf_sha256: str | None = None
) -> ModelInfo:
    """What is known of a model before its weights are loaded: all but their fingerprint."""
    text_config = config.get_text_config()
    return ModelInfo(
        id=id,
        revision=revision,
        gguf_sha256=gguf_sha256,
        model_type=text_config.model_type,
        n_layers=text_config.num_hidden_layers,
        hidden_size=text_config.hidden_size,
        config_sha256=config_sha256(config),
    )


def shared_profile(model: PreTrainedModel) -> Located:
    """The profile that `shared_profile_of` gives for a model."""
    described = architecture(model.config, id="model")
    return shared_profile_of(described.model_copy(update={"weights_sha256": weights_sha256(model)}))


def shared_profile_of(model: ModelInfo) -> Located:
    """Of the profiles that come with ffnskip and were made on this very model, the one that saves most.

    Those over the quality budget do not count.

    Raises:
        FfnskipError: there is none.
    """
    candidates = [(place, load_profile(place, with_weights=False)) for place in locate_all(shared_profiles())]
    savings = {
        place: profile.measured.flops_saved
        for place, profile in candidates
        if _same_architecture(profile, model) and profile.model.weights_sha256 == model.weights_sha256
        if profile.measured and profile.measured.within_budget
    }
    if not savings:
        raise FfnskipError(
            "No profile within the quality budget comes with ffnskip for this model: make one with "
            "`ffnskip calibrate MODEL --dataset wikitext --max-kl 0.05 --output profile.yaml`."
        )
    return max(savings, key=lambda place: savings[place])


def _same_architecture(profile: Profile, found: ModelInfo) -> bool:
    try:
        refuse_other_architecture(profile, found)
    except ProfileError:
        return False
    return True


def check_identity(profile: Profile, model: PreTrainedModel, *, other_weights: bool = False) -> None:
    """Refuse a profile that was made for another model.

    Of a model of the same architecture with other weights only a profile without weights of its own is accepted, with a
    FfnskipWarning, unless `other_weights` says that they are known to be others. A profile without a fingerprint is
    accepted with a FfnskipWarning.

    Raises:
        ProfileError: naming the field; or the profile's weights do not fit into the model's precision.
    """
    found = model_info(model, id=profile.model.id)
    refuse_other_architecture(profile, found)
    refuse_too_large(profile, model.dtype)
    if not other_weights:
        refuse_other_weights(profile, found)


def refuse_too_large(profile: Profile, dtype: torch.dtype) -> None:
    """Raise ProfileError when the profile's weights do not fit into the model's precision."""
    for name, tensor in profile.weights.tensors.items() if profile.weights else ():
        if tensor.is_floating_point() and not bool(tensor.to(dtype).isfinite().all()):
            kind = str(dtype).removeprefix("torch.")
            raise ProfileError(f"The weights: {name}: holds numbers too large for {kind}: load the model in another.")


def refuse_other_architecture(profile: Profile, found: ModelInfo) -> None:
    """Raise ProfileError, naming the field, when the profile was made for a model of another architecture."""
    for field in ("model_type", "n_layers", "hidden_size", "config_sha256"):
        expected, actual = getattr(profile.model, field), getattr(found, field)
        if expected != actual:
            raise ProfileError(
                f"The profile is for another model: model.{field} is {expected} in the profile ({profile.model.id}) "
                f"and {actual} in the model."
            )


def refuse_other_weights(profile: Profile, found: ModelInfo) -> None:
    """Raise ProfileError, or warn if the profile has no weights of its own, when it was made on other weights.

    The fingerprint decides. Where the profile has none, the GGUF file or the commit does, if both are known.
    """
    made_for = profile.model
    for field in ("weights_sha256", "gguf_sha256", "revision"):
        expected, actual = getattr(made_for, field), getattr(found, field)
        if expected is not None and actual is not None:
            break
    else:
        _warn(
            "The profile does not say which weights it was made on, as those of earlier versions do not: if the model "
            f"is not {made_for.id}, or has been trained further, what it skips is noise."
        )
        return
    if expected == actual:
        return
    sentence = (
        f"The profile was made on other weights: model.{field} is {expected} in the profile ({made_for.id}) and "
        f"{actual} in the model, or its rope, windows or caps are other ones."
    )
    if profile.weight_shapes:
        raise ProfileError(
            f"{sentence} What was fitted to the one is noise on the other: calibrate anew, or go on "
            "with --other-weights (other_weights=True) and look at the KL."
        )
    _warn(f"{sentence} What it skips and costs here is not what it says.")


def _warn(sentence: str) -> None:
    warnings.warn(sentence, FfnskipWarning, stacklevel=5)
