"""Prove on the model itself that a profile does what it says.

Frameworks that replace a layer's forward, or models that do not call their FFN as expected, would otherwise make
skipping a silent no-op, or damage the model in silence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ffnskip.errors import UnsupportedModelError
from ffnskip.general.wrap import Applied, refuse_second_profile
from ffnskip.model.forward import forward
from ffnskip.model.sites import FFNSite, ffn_sites, first_output, input_device, watch
from ffnskip.model.types import refuse_type
from ffnskip.profiles.profile import Profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHECK_TOKENS = 8


@torch.inference_mode()
def self_check(model: PreTrainedModel, profile: Profile) -> None:
    """Run a few tokens without and with the profile, and compare.

    Proves that every FFN is a function of its own input that is run once per pass; for a rule that reads its output,
    that this is added to the residual stream where the rule thinks it is; and that with a threshold nothing can pass,
    so that the rule runs but nothing is skipped, the logits are bit-identical to the untouched model's.

    Raises:
        UnsupportedModelError: naming what does not hold.
    """
    refuse_second_profile(model)
    needs_stream = profile.skip.by.reads == "output"
    refuse_type(model.config, needs_stream=needs_stream)
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.arange(_CHECK_TOKENS, device=input_device(model))[None] * 7919 % vocabulary
    plain = _check_functions(model, tokens)
    if needs_stream:
        _check_residual(model, tokens)
    never, skip = profile.never, profile.skip
    settings = never.skip.model_copy(update={"warm_up": 0, "refresh_every": None})
    with Applied(model, never.model_copy(update={"skip": settings}), "score") as applied:
        wrapped: Tensor = forward(model, tokens, use_cache=False).logits
        calls = [ffn.calls for ffn in applied.ffns]
        rule = skip.by
        blind = rule.reads == "nothing" and not rule.leaves_out_parts
        looked_at = range(0) if blind else rule.looks_at(skip.cold_s, skip.cold_e)
        checked = [applied.stats.checked[layer] for layer in looked_at]
    if any(count != 1 for count in calls):
        raise UnsupportedModelError("Self-check failed: the model does not call every wrapped FFN once per pass.")
    if any(count != _CHECK_TOKENS for count in checked):
        raise UnsupportedModelError("Self-check failed: the rule did not see every token in every layer.")
    if not torch.equal(plain, wrapped):
        raise UnsupportedModelError(
            "Self-check failed: with skipping disabled the logits are not the model's own (is it in eval mode?)."
        )


def _check_functions(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The untouched model's logits, after checking that each FFN maps its input, and nothing else, once per pass."""
    sites = ffn_sites(model)
    entered: dict[int, list[Tensor]] = {index: [] for index in range(len(sites))}
    left: dict[int, Tensor] = {}
    passed: dict[int, list[Tensor]] = {index: [] for index in range(len(sites))}

    def enter(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [value for value in (*args, *kwargs.values()) if value is not None]
            if len(given) != 1:
                raise UnsupportedModelError(
                    f"The FFN of layer {index} is given more than its input, so it cannot be skipped alone."
                )
            entered[index].append(given[0])

        return hook

    def leave(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            passed[index].append(first_output(output))

        return hook

    def leave_layer(index: int) -> Any:
        return lambda module, args, output: left.__setitem__(index, first_output(output))

    hooks = []
    for index, site in enumerate(sites):
        hooks.append(site.layer.register_forward_hook(leave_layer(index)))
        for module in site.modules:
            hooks.append(module.register_forward_pre_hook(enter(index), with_kwargs=True))
            hooks.append(module.register_forward_hook(leave(index)))
    try:
        logits: Tensor = forward(model, tokens, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    for index, site in enumerate(sites):
        _check_function(index, site, entered[index], passed[index])
        if _same(left[index], passed[index][-1]):
            raise UnsupportedModelError(f"Self-check failed: the FFN of layer {index} adds the residual stream itself.")
    return logits


def _check_function(index: int, site: FFNSite, entered: list[Tensor], passed: list[Tensor]) -> None:
    """Check what entered an FFN's modules and what came out of them, in the order of their calls."""
    if not entered:
        raise UnsupportedModelError("Self-check failed: the model does not call the FFN of every layer.")
    if len(entered) != len(site.modules):
        raise UnsupportedModelError(f"Self-check failed: the FFN of layer {index} is not run once per pass.")
    parts = len(site.parts)
    expected = [entered[0]] * parts if site.join == "sum" else [entered[0], *passed[: parts - 1]]
    if site.norm_after is not None:
        expected.append(passed[0] + passed[1] if site.join == "sum" else passed[parts - 1])
    if not all(map(_same, entered, expected)) or entered[0].numel() != passed[-1].numel():
        raise UnsupportedModelError(f"Self-check failed: the FFN of layer {index} is no plain function of its input.")


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same numbers, in whatever shape."""
    return a.numel() == b.numel() and torch.equal(a.flatten().to(b.device), b.flatten())


def _check_residual(model: PreTrainedModel, tokens: Tensor) -> None:
    """Check that each layer's output is ``h + f`` (plus parallel attention)."""
    sites = ffn_sites(model)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    entered: dict[int, Tensor] = {}
    left: dict[int, Tensor] = {}

    def keep_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        entered[len(left)] = args[0]
        left[len(left)] = first_output(output)

    hooks = [site.layer.register_forward_hook(keep_output) for site in sites]
    try:
        with watch(model, lambda layer, h, f: seen.__setitem__(layer, (h, f))):
            forward(model, tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != len(sites):
        raise UnsupportedModelError("Self-check failed: the model does not call the FFN of every layer.")
    for layer, (h, f) in seen.items():
        if torch.equal(h, entered[layer].to(h.device)):
            continue  # attention reads the same stream and is added together with f
        same_shape = left[layer].shape == h.shape
        if not same_shape or not torch.allclose(left[layer], h + f, rtol=0.02, atol=0.02 * float(f.abs().max())):
            raise UnsupportedModelError(
                f"Self-check failed: layer {layer} does not add its FFN's output to the stream."
            )
