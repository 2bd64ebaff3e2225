"""Pico models of many architectures, built in-process: 6 layers, hidden size 32, random weights from a fixed seed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import cycle
from typing import Any

import torch
from support.factories import make_profile
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from ffnskip.model import packed
from ffnskip.model.matrix import pack
from ffnskip.model.sites import ffn_sites, first_output, watch
from ffnskip.profiles.identity import model_info
from ffnskip.profiles.profile import Profile
from ffnskip.rules.cosine import similarity
from ffnskip_cli.calibration.recording.file import Source

torch.set_num_threads(1)  # sharing products this small between threads costs far more than it gains

N_LAYERS, HIDDEN, VOCABULARY = 6, 32, 101
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# Name of the test case: what its configuration says beyond SIZES. Its model_type is the name up to the first dash.
SUPPORTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0},
    "phi": {},
    "gemma": {"head_dim": 8},
    "phi3": {},
    "cohere": {},
    "gpt_neox-parallel": {"use_parallel_residual": True},
    "gpt_neox-sequential": {"use_parallel_residual": False},
    "stablelm-parallel": {"use_parallel_residual": True},
    "stablelm-sequential": {"use_parallel_residual": False},
    "starcoder2": {},
    "gpt2": WITHOUT_DROPOUT | {"tie_word_embeddings": False},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "falcon-one-norm": {"alibi": False, "new_decoder_architecture": False, "parallel_attn": True},
    "falcon-two-norms": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "glm4": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 0, 1]},
}
REFUSED: dict[str, dict[str, Any]] = {"bloom": {}}
PARALLEL = ("phi", "cohere", "gpt_neox-parallel", "stablelm-parallel", "falcon-one-norm", "falcon-two-norms")


def pico_model(name: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """A model in eval mode whose similarities cos(h, h + f) differ from token to token and from layer to layer."""
    settings = SIZES | SUPPORTED.get(name, REFUSED.get(name, {})) | config
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.partition("-")[0], **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:  # keep the size of what passes through
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:  # norms and biases: near what they were, but not trivial
                parameter.add_(0.3 * noise)
    return model.to(dtype).eval()


def pack_in_turns(model: PreTrainedModel) -> None:
    """Pack every third linear layer to int8 and the others to int4, as GGUF files mix their types."""
    turns = cycle(("int4", "int8", "int4"))
    packed._replace(model, packed._places(model, "int4"), lambda linear: pack(linear.weight, next(turns), linear.bias))


def float64_model(name: str = "llama", *scales: float) -> PreTrainedModel:
    """In float64, so that no value lies within rounding of a threshold; a scale per layer makes FFNs small or large.

    There is one for all tests, which leave it as it was.
    """
    return _float64_model(name, scales)


@cache
def _float64_model(name: str, scales: tuple[float, ...]) -> PreTrainedModel:
    model = pico_model(name, torch.float64)
    with torch.no_grad():
        for site, scale in zip(ffn_sites(model), scales, strict=False):
            for weight in site.ffn.parameters():
                weight *= scale ** (1 / 3)  # three matrices one after the other
    return model


def pico_tokens(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Random tokens ``[batch, length]``, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def pico_source(model: PreTrainedModel) -> Source:
    """What identifies a pico model in a recording."""
    return Source(model_info(model, id="org/pico"), "ab" * 32, str(model.dtype).removeprefix("torch."))


def pico_profile(model: PreTrainedModel, **overrides: Any) -> Profile:
    """A profile of that very model; overrides as in `make_profile`, which has region [1, 5) and warm-up 2."""
    return make_profile(**{**model_info(model, id="org/pico").model_dump(), **overrides})


@torch.inference_mode()
def dense_similarities(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """``[batch x sequence, n_layers]`` of the model that skips nothing."""
    seen: dict[int, Tensor] = {}
    with watch(model, lambda layer, h, f: seen.__setitem__(layer, similarity(h, f).flatten())):
        model(tokens, use_cache=False)
    return torch.stack([seen[layer] for layer in range(len(seen))], dim=1)


def middle_threshold(model: PreTrainedModel, tokens: Tensor) -> float:
    """A threshold that some tokens reach and others do not: the median in the region [1, 4), where triggers count."""
    return float(dense_similarities(model, tokens)[:, 1:4].median())


@torch.inference_mode()
def feed(model: PreTrainedModel, text: Tensor, prompt: int, past: DynamicCache | None = None) -> Tensor:
    """Logits ``[batch, length, vocabulary]`` of a prompt in one pass and then of one token per pass."""
    past = DynamicCache(config=model.config) if past is None else past
    chunks = [text[:, :prompt], *text[:, prompt:].split(1, dim=1)]
    return torch.cat([model(chunk, past_key_values=past).logits for chunk in chunks], dim=1)


@contextmanager
def ffn_runs(model: PreTrainedModel) -> Iterator[list[list[int]]]:
    """How many tokens each layer's own FFN ran, call by call; enter it before a profile is applied."""
    ffns = [site.ffn for site in ffn_sites(model)]
    runs: list[list[int]] = [[] for _ in ffns]

    def counted(forward: Callable[[Tensor], Tensor], run: list[int]) -> Callable[[Tensor], Tensor]:
        def count(x: Tensor) -> Tensor:
            run.append(x.shape[:-1].numel())
            return forward(x)

        return count

    for ffn, run in zip(ffns, runs, strict=True):
        ffn.forward = counted(ffn.forward, run)
    try:
        yield runs
    finally:
        for ffn in ffns:
            del ffn.forward


def adds_nothing(module: nn.Module, output: Tensor) -> Tensor:
    """Whose FFN added exactly nothing, ``[batch, sequence]``: who skipped, where there is no compensation."""
    return (output == 0).all(dim=-1)


@contextmanager
def decisions(
    model: PreTrainedModel, skipped: Callable[[nn.Module, Tensor], Tensor] = adds_nothing
) -> Iterator[list[Tensor]]:
    """Collects one bool tensor ``[batch, sequence, n_layers]`` per forward pass: who skipped."""
    passes: list[Tensor] = []
    layers: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        layers.append(skipped(module, first_output(output)))
        if len(layers) == N_LAYERS:
            passes.append(torch.stack(layers, dim=-1))
            layers.clear()

    hooks = [site.ffn.register_forward_hook(look) for site in ffn_sites(model)]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def entering_and_leaving(model: PreTrainedModel, layer: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What enters and what leaves a layer, ``[batch, sequence, hidden]``."""
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        seen.extend((args[0], output if isinstance(output, Tensor) else output[0]))

    hook = layer.register_forward_hook(look)
    model(tokens)
    hook.remove()
    return seen[0], seen[1]
