"""A whole decode step that leaves out a forced share of its inputs against the dense step, on random weights.

    python benchmarks/sparse_step.py --weights bfloat16 --left-out 0.4

The shape is that of a Qwen2 with 1.5 billion parameters; `--layers` makes it smaller. The inputs that are left out are
drawn once for each layer: the same for every token, so that the share is exact and random weights do not matter. The
decoders take turns every few tokens, and what is printed are medians of the ratios of neighbouring turns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from ffnskip import Decoder, Profile, pack_weights
from ffnskip.model.parts import FFN_ROLES, parts_of
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.identity import model_info
from ffnskip.profiles.schema import Compensation, Parts, Skip
from ffnskip.profiles.weights import Weights
from ffnskip_cli.measure.flops import model_cost, overhead

_PROMPT, _TURN = 32, 6
_KEPT, _LEFT_OUT = 1e30, 1e-30  # constants of channels that are kept and left out at a threshold of 1e-6


def main(
    weights: Annotated[
        Literal["bfloat16", "int8", "int4", "float32"], typer.Option(help="Format of the matrices.")
    ] = "bfloat16",
    left_out: Annotated[float, typer.Option(help="Share of FFN inputs and neurons that are left out.")] = 0.4,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 28,
    tokens: Annotated[int, typer.Option(help="Tokens that each decoder decodes.")] = 120,
) -> None:
    """Measure and print."""
    model = random_model(layers, weights)
    profile = forced_profile(model, left_out)
    if weights in ("int8", "int4"):
        pack_weights(model, weights)
    decoders = {
        "dense": Decoder(model, path="fused", check=False),
        "parts": Decoder(model, profile, path="fused", check=False),
        "nothing left out": Decoder(model, profile.never, path="fused", check=False),
    }
    seconds = _turns(decoders, tokens)
    stats = decoders["parts"].stats
    ceiling = model_cost(model).ceiling(stats, overhead(profile, model), _PROMPT + tokens / 2)
    print(
        f"{weights}, {layers} layers, {torch.get_num_threads()} threads; left out of the FFNs: {stats.skip_ratio:.3f}"
    )
    print("| decoder | tokens/s | over dense | ceiling |\n|---|---|---|---|")
    for name, taken in seconds.items():
        ratio = median(dense / mine for dense, mine in zip(seconds["dense"], taken, strict=True))
        most = f"{ceiling:.2f}" if name == "parts" else ""
        print(f"| {name} | {1 / median(taken):.2f} | {ratio:.3f} | {most} |")


def random_model(layers: int, weights: str) -> PreTrainedModel:
    """A Qwen2 of random numbers; bfloat16 unless `weights` is float32."""
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return model


def forced_profile(model: PreTrainedModel, share: float) -> Profile:
    """A profile that leaves out that share of the channels that FFNs read, whatever they hold."""
    parts = parts_of(ffn_sites(model)[0].layer)
    n_layers = len(ffn_sites(model))
    profile = Profile(
        schema="ffnskip/v1",
        model=model_info(model, id="random/weights"),
        skip=Skip(rule="price", threshold=1e-6, warm_up=0, cold_s=0, cold_e=n_layers),
        compensation=Compensation(kind="none"),
        parts=Parts(**{part.role: part.width for part in parts}),
        made_with={},
    )
    constants: dict[str, Tensor] = {}
    for name, shape in profile.weight_shapes.items():
        drawn = torch.rand(shape).argsort(dim=-1).argsort(dim=-1) < round(share * shape[-1])
        of_ffn = any(name.endswith(role) for role in FFN_ROLES)
        constants[name] = torch.where(drawn & of_ffn, _LEFT_OUT, _KEPT)
    return profile.with_weights(Weights(constants))


def _turns(decoders: dict[str, Decoder], tokens: int) -> dict[str, list[float]]:
    """Seconds per token of each turn."""
    prompt = torch.randint(0, 150_000, (1, _PROMPT))
    streams: dict[str, Iterator[Tensor]] = {
        name: decoder.decode(prompt, max_new_tokens=2 + tokens) for name, decoder in decoders.items()
    }
    for stream in streams.values():
        next(stream), next(stream)
    taken: dict[str, list[float]] = {name: [] for name in decoders}
    names = list(decoders)
    for turn in range(tokens // _TURN):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            next(streams[name])  # the first one finds the caches full of another decoder's weights
            start = time.perf_counter()
            for _ in range(_TURN - 1):
                int(next(streams[name]))
            taken[name].append((time.perf_counter() - start) / (_TURN - 1))
    return taken


if __name__ == "__main__":
    typer.run(main)
