"""What holds for a type of model: that a profile does to it what the rules say, checked without the package's help."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from support.factories import make_compensated
from support.model_types import VOCABULARY
from torch import Tensor, nn
from transformers import PreTrainedModel

import ffnskip
from ffnskip.model.sites import FFNSite, ffn_sites, first_output
from ffnskip.profiles.identity import model_info
from ffnskip.profiles.profile import Profile

PROMPT, NEW, WARM_UP = 6, 8, 2
_TOKENS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


@dataclass
class Verdict:
    """What was found.

    Attributes:
        rules: `any`, or `all but cosine`, or empty if the model is refused.
        sentence: why not all rules, or none.
        wrong: what was not as it should be.
        path: of `Decoder` without a profile.
    """

    rules: str = ""
    sentence: str = ""
    wrong: list[str] = field(default_factory=list)
    path: str = ""


def check_model(model: PreTrainedModel) -> Verdict:
    """Try both rules on a model, and compare what they do with hooks that do the same."""
    verdict = Verdict()
    dense = logits(model)
    before = [(name, module, module.__dict__.get("forward")) for name, module in model.named_modules()]
    for rule, never in (("predicted-damage", 0.0), ("cosine", 2.0)):
        try:
            profile = profile_of(model, rule, never)
            with ffnskip.apply(model, profile, mode="score"):
                _expect(verdict, f"{rule} never", torch.equal(logits(model), dense))
        except ffnskip.UnsupportedModelError as error:
            verdict.sentence = str(error)
            break
        verdict.rules = "any" if verdict.rules else "all but cosine"
        _always(verdict, model, rule)
        _some(verdict, model, rule)
        _generating(verdict, model, rule)
    after = [(name, module, module.__dict__.get("forward")) for name, module in model.named_modules()]
    _expect(verdict, "removal", after == before and torch.equal(logits(model), dense))
    return verdict


def profile_of(model: PreTrainedModel, rule: str, threshold: float, warm_up: int = 0) -> Profile:
    """Of all layers but the first, without compensation, and with random probes."""
    info = model_info(model, id="org/tiny").model_dump()
    settings = {"cold_s": 1, "cold_e": info["n_layers"], "threshold": threshold, "warm_up": warm_up, "rule": rule}
    return make_compensated("none", **info | settings)


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    """Of some tokens, ``[2, 12, vocabulary]``."""
    result: Tensor = model(_TOKENS, use_cache=False).logits
    return result


def _expect(verdict: Verdict, what: str, holds: bool) -> None:
    if not holds:
        verdict.wrong.append(what)


Silenced = Callable[[int, Tensor], Tensor]  # of a layer and its FFN's input [n, hidden]: which tokens, [n] bool


@contextmanager
def silenced(model: PreTrainedModel, silent: Silenced) -> Iterator[None]:
    """While inside, hooks replace what FFNs add by zeros."""

    def hooks_of(index: int, site: FFNSite) -> list[torch.utils.hooks.RemovableHandle]:
        inputs: list[Tensor] = []

        def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[:] = [args[0].flatten(0, -2)]

        def leave(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> object:
            f = first_output(output)
            kept = f.reshape(-1, f.shape[-1]).masked_fill(silent(index, inputs[0])[:, None], 0.0).view_as(f)
            return kept if isinstance(output, Tensor) else (kept, *output[1:])

        sinks = site.parts if site.join == "sum" else site.modules[-1:]
        return [site.ffn.register_forward_pre_hook(enter), *(sink.register_forward_hook(leave) for sink in sinks)]

    hooks = [hook for index, site in enumerate(ffn_sites(model)) if index > 0 for hook in hooks_of(index, site)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _all(layers: range) -> Silenced:
    return lambda layer, x: torch.full((len(x),), layer in layers)


def _skipped_always(model: PreTrainedModel, rule: str) -> range:
    """The layers that a rule skips for every token, if its threshold is that low."""
    return range(2 if rule == "cosine" else 1, len(ffn_sites(model)))


def _lowest(rule: str) -> float:
    return -1.0 if rule == "cosine" else 1e30


def _always(verdict: Verdict, model: PreTrainedModel, rule: str) -> None:
    profile, layers = profile_of(model, rule, _lowest(rule)), _skipped_always(model, rule)
    with ffnskip.apply(model, profile, mode="score") as applied:
        skipping = logits(model)
    with silenced(model, _all(layers)):
        _expect(verdict, f"{rule} always", torch.equal(logits(model), skipping))
    counts = [_TOKENS.numel() * (layer in layers) for layer in range(len(ffn_sites(model)))]
    _expect(verdict, f"{rule} counts", applied.stats.skipped == counts)


def _some(verdict: Verdict, model: PreTrainedModel, rule: str) -> None:
    """Random probes let some tokens skip; hooks do as the same probes say."""
    if rule == "cosine":
        return
    profile = profile_of(model, rule, 1.0)
    assert profile.weights
    probes, biases = (profile.weights.tensors[f"probe.{name}"] for name in ("weight", "bias"))
    with ffnskip.apply(model, profile, mode="score") as applied:
        skipping = logits(model)
    with silenced(model, lambda layer, x: x.float() @ probes[layer - 1].float() + biases[layer - 1] < 0):
        expected = logits(model)
    near = torch.allclose(skipping, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))
    _expect(verdict, f"{rule} some", near and applied.stats.skip_ratio > 0)


@torch.inference_mode()
def _generating(verdict: Verdict, model: PreTrainedModel, rule: str) -> None:
    if not model.can_generate():
        return
    passes = [0]
    layers = _skipped_always(model, rule)
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = _TOKENS[:1, :PROMPT]

    def generated() -> list[int]:
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0, PROMPT:].tolist()

    def past_warm_up(layer: int, x: Tensor) -> Tensor:
        past = torch.arange(len(x)) >= PROMPT + WARM_UP  # of a model without a cache, which sees the whole each time
        return past | (len(x) == 1 < passes[0] - WARM_UP) if layer in layers else torch.zeros_like(past)

    try:
        generated()
    except ValueError:  # xLSTM's own, with these sizes
        verdict.path = "none"
        return
    count = model.register_forward_pre_hook(lambda module, args: passes.__setitem__(0, passes[0] + 1))
    with silenced(model, past_warm_up):
        expected = generated()
    count.remove()
    profile = profile_of(model, rule, _lowest(rule), WARM_UP)
    with ffnskip.apply(model, profile) as applied:
        _expect(verdict, f"{rule} generate", generated() == expected)
    decoder = ffnskip.Decoder(model, profile)
    try:
        decoded = [int(tokens[0]) for tokens in decoder.decode(prompt, max_new_tokens=NEW)]
    except ffnskip.UnsupportedModelError:  # it keeps no cache
        verdict.path = "none"
        return
    verdict.path = decoder.path
    n_past = NEW - 1 - WARM_UP
    stats = applied.stats
    counted = (stats.tokens, stats.warm_up_tokens, sum(stats.skipped)) == (n_past, WARM_UP, n_past * len(layers))
    _expect(verdict, f"{rule} generate counts", counted)
    _expect(verdict, f"{rule} Decoder", decoded == expected)
