"""Which types of models cannot skip FFNs, known from the configuration alone, before any weights are loaded.

What these sentences say was found by `ffnskip.apply`'s self-check on a small model of each type; docs/models.md has
the list, and its test compares the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ffnskip.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ADDS_ITSELF = "their FFNs add the residual stream themselves"
_NONE = "they have no FFNs"
REFUSED = {
    "bloom": _ADDS_ITSELF,
    "cpmant": _ADDS_ITSELF,
    "deepseek_v4": "their experts are chosen by token ids, not by the FFN's input alone",
    "falcon_mamba": _NONE,
    "hrm_text": "they run their layers several times for each token",
    "mamba": _NONE,
    "mamba2": _NONE,
    "mpt": _ADDS_ITSELF,
    "rwkv": "their FFNs mix each token with the one before",
    "zamba": "their layers share one FFN",
    "zamba2": "their layers share one FFN",
    "zaya": "their FFNs hand router states on from layer to layer",
}
# Layers whose output is not ``h + f``: it is scaled, mixed into several streams, or normalized once more.
INPUT_ONLY = (
    "beam",
    "doge",
    "gemma3n_text",
    "gemma4_text",
    "hy_v4",
    "inkling2_text",
    "inkling_text",
    "longcat_flash",
    "minimax",
    "openai-gpt",
    "qwen4_exp_text",
)


def refuse_type(config: PreTrainedConfig, *, needs_stream: bool = False) -> None:
    """Raise UnsupportedModelError for a type whose FFNs cannot be skipped.

    Args:
        config: of the model.
        needs_stream: whether the rule must see an FFN's output beside the residual stream it is added to.
    """
    kind = config.get_text_config().model_type
    if kind in REFUSED:
        raise UnsupportedModelError(f"Models of type {kind!r} cannot skip FFNs: {REFUSED[kind]}.")
    if needs_stream and kind in INPUT_ONLY:
        raise UnsupportedModelError(
            f"Models of type {kind!r} do more with an FFN's output than to add it to what entered, which the rule "
            "cosine compares: use --rule predicted-damage."
        )
