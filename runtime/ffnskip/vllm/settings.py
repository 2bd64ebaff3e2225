"""What the user gives in vLLM's `--additional-config`, and what of vLLM cannot be had with it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.profiles.profile import Profile, load_profile

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_PREFIX = "ffnskip_"
FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM")


@dataclass(frozen=True)
class Settings:
    """The keys of `--additional-config` that begin with `ffnskip_`.

    Attributes:
        profile: path of the profile; the same on all machines.
        threshold, target, other_weights: as in `ffnskip.apply`.
        deciding: put there by the plugin: what the profile decides by, so that vLLM's cache of compiled graphs tells
            one content of the file from another.
    """

    profile: str
    threshold: float | None = None
    target: float | None = None
    other_weights: bool = False
    deciding: str = ""

    @classmethod
    def read(cls, additional_config: object) -> Settings | None:
        """The settings; None where vLLM is not to use a profile. Raises FfnskipError for keys that there are not."""
        table: dict[str, Any] = additional_config if isinstance(additional_config, dict) else {}
        given = {key.removeprefix(_PREFIX): value for key, value in table.items() if key.startswith(_PREFIX)}
        if not given:
            return None
        known = {field.name for field in fields(cls)}
        if unknown := sorted(given.keys() - known):
            raise FfnskipError(
                f"{_PREFIX}{unknown[0]} is no setting: there are {', '.join(_PREFIX + name for name in sorted(known))}."
            )
        if not isinstance(given.get("profile"), str):
            raise FfnskipError(f"{_PREFIX}profile must name a profile's file.")
        return cls(**given)

    def load(self) -> Profile:
        """The profile with the threshold asked for; raises ProfileError or FfnskipError."""
        return load_profile(self.profile).moved(threshold=self.threshold, target=self.target)


def refuse(config: VllmConfig) -> None:
    """Raise UnsupportedModelError for a model, or a way to run it, that profiles do not go with here."""
    model, parallel = config.model_config, config.parallel_config
    if model.architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"In vLLM there are profiles for {', '.join(FAMILIES)}, not for {model.architecture}."
        )
    reasons = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": max(parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size) > 1,
        "dual batch overlap": parallel.enable_dbo,
        "elastic expert parallelism": parallel.enable_elastic_ep,
        "quantized weights": model.quantization is not None,
        "LoRA": config.lora_config is not None,
        "speculative decoding": config.speculative_config is not None,
        "anything but generating text": model.runner_type != "generate",
    }
    for what, given in reasons.items():
        if given:
            raise UnsupportedModelError(f"In vLLM a profile does not go with {what}: leave one of them out.")
