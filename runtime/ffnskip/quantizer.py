"""A profile as part of a transformers model's configuration, where those of quantization methods stand.

``from_pretrained(…, quantization_config=FFNSkipConfig("profile.yaml"))`` gives a model with the profile on. Saved, its
folder holds the profile too, and loads with it again wherever `ffnskip` has been imported; elsewhere transformers warns
that it does not know the method, and the model is dense.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ffnskip.errors import FfnskipError, FfnskipWarning, ProfileError
from ffnskip.profiles.profile import Profile, load_profile, save_profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnskip.general.wrap import Applied

METHOD = "ffnskip"
_SAVED = "ffnskip.yaml"  # the profile in a saved model's folder


@register_quantization_config(METHOD)
class FFNSkipConfig(QuantizationConfigMixin):
    """Which profile a model is loaded with.

    >>> config = ffnskip.FFNSkipConfig("profile.yaml")
    >>> model = AutoModelForCausalLM.from_pretrained(id, quantization_config=config)
    >>> model.generate(**inputs)
    >>> model.hf_quantizer.applied.stats.skip_ratio

    Args:
        profile: its path, or its name on the Hub. In the configuration of a saved model, a file beside it.
        mode, threshold, target, path, other_weights: as in `ffnskip.apply`.
        quant_method: what transformers knows it by.
    """

    def __init__(
        self,
        profile: str | os.PathLike[str],
        *,
        mode: str = "decode",
        threshold: float | None = None,
        target: float | None = None,
        path: str | None = None,
        other_weights: bool = False,
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method = quant_method
        self.profile = os.fspath(profile)
        self.mode, self.threshold, self.target = mode, threshold, target
        self.path, self.other_weights = path, other_weights


@register_quantizer(METHOD)
class FFNSkipQuantizer(HfQuantizer):
    """Puts the profile on when the weights have been loaded; it quantizes nothing.

    Attributes:
        applied: the profile at work.
        profile: as it was loaded.
    """

    quantization_config: FFNSkipConfig
    applied: Applied
    profile: Profile

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        from ffnskip.general.apply import apply

        config = self.quantization_config
        name = _of_folder(config.profile, model) if self.pre_quantized else config.profile
        profile = load_profile(name)
        settings = {name: getattr(config, name) for name in ("mode", "threshold", "target", "path", "other_weights")}
        self.applied = apply(model, profile, **settings)
        self.profile = profile
        model.save_pretrained = MethodType(_save_pretrained, model)
        return model

    def take_off(self, model: PreTrainedModel) -> None:
        """Leave the model dense, and its configuration that of a plain one."""
        if self.applied.on:
            with warnings.catch_warnings(action="ignore", category=FfnskipWarning):
                self.applied.remove()
        model.__dict__.pop("save_pretrained", None)
        self.remove_quantization_config(model)

    def is_serializable(self) -> bool:
        """Whether the model can be saved: its weights are what they were."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether its weights can be trained."""
        return True


def _of_folder(profile: str, model: PreTrainedModel) -> str:
    """Where the profile lies that a saved model's configuration names: beside it, and nowhere else.

    Raises ProfileError for a name that leads elsewhere, as anybody may have written the configuration.
    """
    if Path(profile).name != profile:
        raise ProfileError(f"The model's configuration names the profile {profile}, which does not lie beside it.")
    folder, commit = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
    if os.path.isdir(folder):
        return str(Path(folder, profile))
    return f"hf://{folder}/{profile}" + (f"@{commit}" if commit else "")


def _save_pretrained(model: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """The model's `save_pretrained`, which writes the profile beside the weights and names it in the configuration."""
    quantizer = model.hf_quantizer
    if not quantizer.applied.on:
        quantizer.take_off(model)
        return model.save_pretrained(save_directory, *args, **kwargs)
    if kwargs.get("push_to_hub"):
        raise FfnskipError("Use model.push_to_hub(…): save_pretrained would upload all but the profile.")
    given, quantizer.quantization_config.profile = quantizer.quantization_config.profile, _SAVED
    try:
        saved = type(model).save_pretrained(model, save_directory, *args, **kwargs)
    finally:
        quantizer.quantization_config.profile = given
    save_profile(quantizer.profile, Path(save_directory, _SAVED))
    return saved
