"""Where the feed-forward blocks of a Hugging Face decoder sit, and how to see what flows through them.

Models differ in where the FFN's residual stream ``h`` comes from and in what happens to its output before it is added:

======================  =====================================  ====================
family                  ``h`` is                               ``f`` is
======================  =====================================  ====================
Llama, Qwen, GPT-2, …   input of the norm before the FFN       the FFN's output
Gemma 2/3, GLM-4        the same                               … after a norm
OLMo 2                  the FFN's own input                    … after a norm
Granite                 input of the norm before the FFN       … times a constant
Phi, Cohere, NeoX, …    input of that norm, which attention    the FFN's output
                        reads too (parallel residual)
======================  =====================================  ====================

They are told apart by the names of their submodules, and `ffnskip.apply` proves the guess on the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ffnskip.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# In the order in which they are looked for; a layer has at most one that fits.
_NORMS_BEFORE = (
    "pre_feedforward_layernorm",
    "feedforward_layernorm",
    "pre_mlp_layernorm",
    "ln_mlp",
    "ln_2",
    "post_attention_layernorm",
    "input_layernorm",
    "ln_1",
)
_NORMS_AFTER = ("post_feedforward_layernorm", "post_mlp_layernorm")


@dataclass(frozen=True)
class FFNSite:
    """One decoder layer's feed-forward block.

    Attributes:
        layer: the decoder layer; its FFN is ``layer.mlp``.
        norm_before: the submodule whose input is ``h``; None where ``h`` is the FFN's own input.
        norm_after: the submodule that the FFN's output passes before it is added; None where there is none.
        scale: the constant that the block's output is multiplied with before it is added.
    """

    layer: nn.Module
    norm_before: str | None
    norm_after: str | None
    scale: float = 1.0

    def child(self, name: str | None) -> nn.Module | None:
        """The layer's submodule of that name, None for no name."""
        return None if name is None else self.layer.get_submodule(name)


def decoder_body(model: PreTrainedModel) -> nn.Module:
    """The module that owns the decoder layers (``model.model``, ``model.transformer``, …)."""
    return _find_layers(model)[0]


def ffn_sites(model: PreTrainedModel) -> list[FFNSite]:
    """The model's feed-forward blocks, one per decoder layer, in order.

    Raises:
        UnsupportedModelError: the layers have no FFN module that can be wrapped.
    """
    return [_site(layer, model.config.model_type) for layer in _find_layers(model)[1]]


def _find_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    n_layers = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == n_layers and hasattr(child[0], "mlp"):
                return module, child
    raise UnsupportedModelError(
        f"Models of type {model.config.model_type!r} have no feed-forward module per layer that could be skipped."
    )


def _site(layer: nn.Module, model_type: str) -> FFNSite:
    if model_type == "bloom":
        raise UnsupportedModelError(
            "BLOOM adds the residual stream inside its FFN, so the FFN cannot be skipped alone."
        )
    norm_after = next((name for name in _NORMS_AFTER if hasattr(layer, name)), None)
    # OLMo 2 normalizes after both blocks and before neither: its FFN reads the residual stream itself.
    reads_h = norm_after is not None and not hasattr(layer, "input_layernorm")
    names = (name for name in _NORMS_BEFORE if getattr(layer, name, None) is not None)
    norm_before = None if reads_h else next(names, None)
    if norm_before is None and not reads_h:
        raise UnsupportedModelError(f"In models of type {model_type!r} the norm in front of the FFN has no known name.")
    return FFNSite(layer, norm_before, norm_after, float(getattr(layer, "residual_multiplier", 1.0)))


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model's token ids belong: the device that looks up their embeddings.

    `model.device` is that of the first weight, which is ``meta`` while accelerate has it offloaded.
    """
    embeddings = model.get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)  # accelerate's, on the modules of a dispatched model
    device = getattr(hook, "execution_device", None)
    if device is None:
        device = next(chain(embeddings.parameters(), embeddings.buffers())).device
    return torch.device(device)


@contextmanager
def watch(model: PreTrainedModel, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """While inside, call ``see(layer, h, f)`` for every FFN that the model runs. The model computes what it always did.

    ``h`` and ``f`` have shape ``[batch, sequence, hidden]``.
    """
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    for index, site in enumerate(ffn_sites(model)):
        hooks += _watch_site(index, site, see)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _watch_site(
    index: int, site: FFNSite, see: Callable[[int, Tensor, Tensor], None]
) -> list[torch.utils.hooks.RemovableHandle]:
    entering: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        entering[:] = [args[0]]

    def leave(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not entering or not isinstance(output, Tensor):
            raise UnsupportedModelError(f"The FFN of layer {index} is no plain function behind a norm.")
        see(index, entering.pop(), output * site.scale)

    ffn = site.layer.get_submodule("mlp")
    source = site.child(site.norm_before) or ffn
    sink = site.child(site.norm_after) or ffn
    return [source.register_forward_pre_hook(enter), sink.register_forward_hook(leave)]
