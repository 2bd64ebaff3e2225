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

They are told apart by the names of their submodules, in the tables below, and `ffnskip.apply` proves the guess on the
model itself. docs/models.md says for which types of models that was done.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ffnskip.errors import UnsupportedModelError
from ffnskip.model.types import refuse_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Join = Literal["chain", "sum"]

# The modules that make up a layer's FFN, in the order in which they are looked for, and how: one after the other, or
# side by side on the same input.
_FFNS: tuple[tuple[tuple[str, ...], Join], ...] = (
    (("block_sparse_moe", "shared_mlp"), "sum"),  # Granite 4
    (("block_sparse_moe",), "chain"),
    (("shared_mlp",), "chain"),
    (("mlp",), "chain"),
    (("feed_forward",), "chain"),
    (("ffn",), "chain"),
    (("mlp_block",), "chain"),
    (("fc1", "activation_fn", "fc2"), "chain"),  # OPT
    (("mixer",), "chain"),  # Nemotron-H, of whose layers only some are FFNs
)
_FFN_MIXERS = ("mlp", "moe")
# In the order in which they are looked for; a layer has at most one that fits.
_NORMS_BEFORE = (
    "pre_feedforward_layernorm",
    "feedforward_layernorm",
    "pre_mlp_layernorm",
    "pre_ff_layernorm",
    "ln_mlp",
    "ln_2",
    "ffn_norm",
    "mlp_norm",
    "norm_ffn",
    "layernorm2",
    "channel_pre_norm",
    "norm_attn_norm.norm_2",
    "final_layer_norm",
    "post_attention_layernorm",
    "input_layernorm",
    "ln_1",
    "norm",
)
_NORMS_AFTER = (
    "post_feedforward_layernorm_1",  # Gemma 4, where experts run beside the FFN and have a norm of their own
    "post_feedforward_layernorm",
    "post_mlp_layernorm",
    "post_ffn_norm",
    "post_norm2",
)
_SCALES = ("residual_multiplier", "residual_scale")


@dataclass(frozen=True)
class FFNSite:
    """One decoder layer's feed-forward block.

    Attributes:
        layer: the decoder layer.
        parts: the modules that compute the FFN.
        join: whether the parts run one after the other, or side by side and are added up.
        norm_before: the module whose input is ``h``; None where ``h`` is the FFN's own input.
        norm_after: the module that the FFN's output passes before it is added; None where there is none.
        scale: the constant that the block's output is multiplied with before it is added.
    """

    layer: nn.Module
    parts: tuple[nn.Module, ...]
    join: Join
    norm_before: nn.Module | None
    norm_after: nn.Module | None
    scale: float = 1.0

    @property
    def ffn(self) -> nn.Module:
        """The FFN's first module, the one that its input enters; in most models the FFN itself."""
        return self.parts[0]

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules between the FFN's input and ``f``, in order."""
        return self.parts if self.norm_after is None else (*self.parts, self.norm_after)


def decoder_body(model: PreTrainedModel) -> nn.Module:
    """The module that takes token ids and runs the decoder layers (``model.model``, ``model.transformer``, …)."""
    return _find_layers(model)[0]


def ffn_sites(model: PreTrainedModel) -> list[FFNSite]:
    """The model's feed-forward blocks in order: one for each decoder layer that has any.

    Layers are counted by these everywhere: in the hybrids that have layers without an FFN, those have no number.

    Raises:
        UnsupportedModelError: the layers have no FFN module that can be wrapped.
    """
    refuse_type(model.config)
    return [site for layer in _find_layers(model)[1] if (site := _site(layer)) is not None]


def _find_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder's list of layers, looked for from its top down, and who runs it: never those of a vision tower."""
    roots = [root for root in (model.get_decoder(), model.base_model) if any(True for _ in root.children())]
    for root in roots:
        level: list[tuple[nn.Module, nn.Module]] = [(root, root)]  # modules, with the closest that takes token ids
        while level:
            for module, body in level:
                for child in module.children():
                    if isinstance(child, nn.ModuleList) and any(_site(layer) is not None for layer in child):
                        return body, child
            level = [(child, _closest(child, body)) for module, body in level for child in module.children()]
    raise UnsupportedModelError(
        f"Models of type {model.config.model_type!r} have no feed-forward module per layer that could be skipped."
    )


def _closest(module: nn.Module, body: nn.Module) -> nn.Module:
    return module if "input_ids" in inspect.signature(module.forward).parameters else body


def _child(layer: nn.Module, name: str) -> nn.Module | None:
    module: object = layer
    for part in name.split("."):
        module = getattr(module, part, None)
    return module if isinstance(module, nn.Module) and not isinstance(module, nn.ModuleList) else None


def _site(layer: nn.Module) -> FFNSite | None:
    parts, join = _parts(layer)
    if not parts:
        return None
    norm_after = next(filter(None, (_child(layer, name) for name in _NORMS_AFTER)), None)
    names = [name for name in _NORMS_BEFORE if _child(layer, name) is not None]
    # OLMo 2 normalizes after both blocks and before neither: its FFN reads the residual stream itself.
    reads_stream = norm_after is not None and names == ["post_attention_layernorm"]
    norm_before = _child(layer, names[0]) if names and not reads_stream else None
    scale = next((s for name in _SCALES if isinstance(s := getattr(layer, name, None), int | float)), 1.0)
    return FFNSite(layer, parts, join, norm_before, norm_after, float(scale))


def _parts(layer: nn.Module) -> tuple[tuple[nn.Module, ...], Join]:
    """A layer's FFN; nothing if it has none, or is one that text does not pass (Llama 3.2 Vision)."""
    if _child(layer, "cross_attn") is None:
        for names, join in _FFNS:
            parts = [part for name in names if (part := _child(layer, name)) is not None]
            mixes = names == ("mixer",) and getattr(layer, "block_type", None) not in _FFN_MIXERS
            if len(parts) == len(names) and not mixes:
                return tuple(parts), join
    return (), "chain"


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


def first_output(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A module's hidden states, whatever else it gives: FFNs with experts may add their router's scores."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def watch(model: PreTrainedModel, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """While inside, call ``see(layer, h, f)`` for every FFN that the model runs. The model computes what it always did.

    ``h`` and ``f`` have shape ``[batch, sequence, hidden]``. Where no norm runs before the FFN, ``h`` is its input.
    """
    hooks = [hook for index, site in enumerate(ffn_sites(model)) for hook in _watch_site(index, site, see)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _watch_site(
    index: int, site: FFNSite, see: Callable[[int, Tensor, Tensor], None]
) -> list[torch.utils.hooks.RemovableHandle]:
    entering: list[Tensor] = []
    shape: list[torch.Size] = []
    addends: list[Tensor] = []

    def enter_layer(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        shape[:] = [args[0].shape] if args else []
        entering.clear()
        addends.clear()

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not entering:
            entering.append(args[0])

    def leave(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        addends.append(first_output(output))
        if site.join == "sum" and len(addends) < len(site.parts):
            return
        f = torch.stack(addends).sum(dim=0) if len(addends) > 1 else addends[0]
        addends.clear()
        if not entering or not isinstance(f, Tensor):
            raise UnsupportedModelError(f"The FFN of layer {index} is no plain function behind a norm.")
        h = entering.pop()
        if h.dim() == 2 and shape:  # OPT flattens batch and sequence meanwhile
            h = h.view(shape[0])
        see(index, h, f.reshape(h.shape) * site.scale)

    sources = filter(None, (site.norm_before, site.ffn))
    sinks = site.parts if site.join == "sum" else site.modules[-1:]
    return [
        site.layer.register_forward_pre_hook(enter_layer),
        *(source.register_forward_pre_hook(enter) for source in sources),
        *(sink.register_forward_hook(leave) for sink in sinks),
    ]
