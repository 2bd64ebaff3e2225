"""Which model a profile belongs to: the facts of its architecture, hashed so that they travel.

The hash covers what makes two checkpoints the same network, and nothing that depends on the version of transformers or
on the container: a model read from the Hub, from a folder and from a GGUF file has one and the same hash.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from ffnskip.errors import ProfileError
from ffnskip.profiles.profile import Profile
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
    facts: dict[str, Any] = {name: getattr(text_config, name, None) for name in _ARCHITECTURE}
    facts["head_dim"] = head_dim(text_config)
    facts["rope_theta"] = (getattr(text_config, "rope_parameters", None) or {}).get("rope_theta")
    rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in facts.items() if v is not None}
    return hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()


def head_dim(config: PreTrainedConfig) -> int:
    """Channels per attention head; many configurations leave it to be derived."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def model_info(
    model: PreTrainedModel, *, id: str, revision: str | None = None, gguf_sha256: str | None = None
) -> ModelInfo:
    """What a profile says about the model it was made on. `id` and `revision` are the caller's knowledge."""
    config = model.config.get_text_config()
    return ModelInfo(
        id=id,
        revision=revision,
        gguf_sha256=gguf_sha256,
        model_type=config.model_type,
        n_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        config_sha256=config_sha256(model.config),
    )


def check_identity(profile: Profile, model: PreTrainedModel) -> None:
    """Raise ProfileError, naming the field, when the profile was made for a model of another architecture."""
    found = model_info(model, id=profile.model.id)
    for field in ("model_type", "n_layers", "hidden_size", "config_sha256"):
        expected, actual = getattr(profile.model, field), getattr(found, field)
        if expected != actual:
            raise ProfileError(
                f"The profile is for another model: model.{field} is {expected} in the profile ({profile.model.id}) "
                f"and {actual} in the model."
            )
