"""Put a profile on a Hugging Face model, and prove that it is on.

Frameworks that replace a layer's forward, or models that do not call their FFN as expected, would otherwise make
skipping a silent no-op, or damage the model in silence.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor, nn

from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.general.walk import Mode
from ffnskip.general.wrap import Applied, SkippableFFN, refuse_second_profile
from ffnskip.model.forward import forward
from ffnskip.model.sites import ffn_sites, input_device, watch
from ffnskip.profiles.identity import check_identity
from ffnskip.profiles.profile import Profile, load_profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHECK_TOKENS = 8


def apply(
    model: PreTrainedModel,
    profile: Profile | str | os.PathLike[str],
    *,
    mode: Mode = "decode",
    threshold: float | None = None,
    target: float | None = None,
    check: bool = True,
    other_weights: bool = False,
) -> Applied:
    """Make `model` skip FFN blocks as `profile` says, in place.

    >>> with ffnskip.apply(model, "profile.yaml") as applied:
    ...     model.generate(**inputs)
    ...     print(applied.stats.skip_ratio)

    Args:
        model: a Hugging Face decoder. Its weights stay where they are.
        profile: a profile, or the path of one.
        mode: `decode` for generation: the prompt and the first `warm_up` generated tokens run dense. A pass over
            several tokens counts as a prompt, so speculative decoding hardly skips, and a prompt must not be fed in
            chunks that end with a single token. `score` for full forward passes: every position from `warm_up` on may
            skip, as if it had been generated.
        threshold: replaces the profile's.
        target: replaces the profile's threshold by the one that its curve has at this skip_ratio.
        check: prove on the model itself, with two short forward passes, that the profile does what it says.
        other_weights: take a profile that was made on other weights of the same architecture, such as another
            fine-tune's, an adapter's or those of a coarser GGUF file. What it costs is then to be measured.

    Raises:
        ProfileError: the profile cannot be read or belongs to another model.
        FfnskipError: the mode is unknown, the threshold is not one of the rule's, the target is off the curve, or both
            are given.
        UnsupportedModelError: the model's FFNs cannot be wrapped, or the self-check failed.
    """
    if not isinstance(profile, Profile):
        profile = load_profile(profile)
    profile.refuse_missing_weights()
    refuse_second_profile(model)
    check_identity(profile, model, other_weights=other_weights)
    if mode not in get_args(Mode):
        raise FfnskipError(f"The mode must be one of {', '.join(get_args(Mode))}, not {mode!r}.")
    profile = profile.moved(threshold=threshold, target=target)
    if check:
        self_check(model, profile)
    return Applied(model, profile, mode)


@torch.inference_mode()
def self_check(model: PreTrainedModel, profile: Profile) -> None:
    """Run a few tokens without and with wrapped FFNs, and compare.

    Proves that every FFN is found where its residual stream is; that the wrapped ones are called once per pass and see
    every token; and that with a threshold nothing can pass, so that the rule runs but nothing is skipped, the logits
    are bit-identical to the untouched model's.

    Raises:
        UnsupportedModelError: naming what does not hold.
    """
    refuse_second_profile(model)
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.arange(_CHECK_TOKENS, device=input_device(model))[None] * 7919 % vocabulary
    plain = _check_residual(model, tokens)
    never, skip = profile.never, profile.skip
    settings = never.skip.model_copy(update={"warm_up": 0, "refresh_every": None})
    with Applied(model, never.model_copy(update={"skip": settings}), "score") as applied:
        wrapped: Tensor = forward(model, tokens, use_cache=False).logits
        calls = [site.layer.mlp.calls for site in ffn_sites(model) if isinstance(site.layer.mlp, SkippableFFN)]
        rule = skip.by
        blind = rule.reads == "nothing" and not rule.leaves_out_parts
        looked_at = range(0) if blind else rule.looks_at(skip.cold_s, skip.cold_e)
        checked = [applied.stats.checked[layer] for layer in looked_at]
    if not rule.leaves_out_parts and calls != [1] * (skip.cold_e - skip.cold_s):
        raise UnsupportedModelError("Self-check failed: the model does not call every wrapped FFN once per pass.")
    if any(count != _CHECK_TOKENS for count in checked):
        raise UnsupportedModelError("Self-check failed: the rule did not see every token in every layer.")
    if not torch.equal(plain, wrapped):
        raise UnsupportedModelError(
            "Self-check failed: with skipping disabled the logits are not the model's own (is it in eval mode?)."
        )


def _check_residual(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The untouched model's logits, after checking that each layer's output is ``h + f`` (plus parallel attention)."""
    sites = ffn_sites(model)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    entered: dict[int, Tensor] = {}
    left: dict[int, Tensor] = {}

    def keep_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        entered[len(left)] = args[0]
        left[len(left)] = output if isinstance(output, Tensor) else output[0]

    hooks = [site.layer.register_forward_hook(keep_output) for site in sites]
    try:
        with watch(model, lambda layer, h, f: seen.__setitem__(layer, (h, f))):
            logits: Tensor = forward(model, tokens, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != len(sites):
        raise UnsupportedModelError("Self-check failed: the model does not call the FFN of every layer.")
    for layer, (h, f) in seen.items():
        if torch.equal(h, entered[layer].to(h.device)):  # it may have come from the device of another layer
            continue  # parallel residual: attention reads the same stream and is added together with f
        same_shape = left[layer].shape == h.shape
        if not same_shape or not torch.allclose(left[layer], h + f, rtol=0.02, atol=0.02 * float(f.abs().max())):
            raise UnsupportedModelError(
                f"Self-check failed: layer {layer} does not add its FFN's output to the stream."
            )
    return logits
