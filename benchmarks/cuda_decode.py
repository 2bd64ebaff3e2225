"""Time the decode step of Triton kernels on a GPU, dense and skipping, beside Hugging Face's generate and the roofline.

    python benchmarks/cuda_decode.py --shape llama-2-7b --ratio 0.25
    python benchmarks/cuda_decode.py --shape tiny --device cpu --new-tokens 3 --rounds 1    # does it run at all?

builds a model with random weights in bfloat16, lets random probes skip about that share of its FFNs, and prints a
table. With a static cache on a GPU, generate compiles the model.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer

from ffnskip.fast.cache import KeyValueCache
from ffnskip.fast.cuda.cuda_step import CudaStep
from ffnskip.fast.families import fuse
from ffnskip.fast.fused_model import FusedModel
from ffnskip.fast.skipping import FusedCompensation, FusedSkip
from ffnskip.model.matrix import Matrix, plain
from ffnskip.stats import SkipStats

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    | {"num_attention_heads": 32, "num_key_value_heads": 32},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 128}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
}


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-2-7b",
    ratio: Annotated[float, typer.Option(help="Share of the FFNs to skip, between 0 and 1.")] = 0.25,
    compensation: Annotated[float, typer.Option(help="Its rank and neurons, as shares of the FFN's sizes.")] = 1 / 6,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to time per round.")] = 128,
    rounds: Annotated[int, typer.Option(help="Rounds; all ways take turns within each.")] = 7,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a trial in Triton's interpreter.")] = "cuda",
) -> None:
    """Measure and print a table."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"choose from {', '.join(SHAPES)}", param_hint="--shape")
    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here", param_hint="--device")
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    torch.manual_seed(0)
    model = build_model(SHAPES[shape], prompt + new_tokens + 1, torch.device(device))
    fused = fuse(model)
    tokens = torch.randint(0, fused.vocabulary, (1, prompt), device=device)
    skip = random_skip(fused, ratio, compensation)
    profiles = {"CudaStep, dense": None, "CudaStep, skipping": skip}
    steps = {name: step_of(fused, profile, prompt + new_tokens + 1) for name, profile in profiles.items()}
    ways: dict[str, Callable[[], float]] = {
        name: partial(seconds_per_token, step, model, tokens, new_tokens) for name, step in steps.items()
    }
    for name, implementation in (("generate, dynamic cache", None), ("generate, static cache", "static")):
        ways[name] = partial(generate_seconds, model, tokens, new_tokens, implementation)
    error = relative_error(steps["CudaStep, dense"], model, tokens)
    for way in ways.values():
        way()  # compiles, records
    steps["CudaStep, skipping"].drain_counts(SkipStats(len(fused.layers)))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(way())
    steps["CudaStep, skipping"].drain_counts(stats := SkipStats(len(fused.layers)))
    skipped = sum(stats.skipped) / (rounds * new_tokens * len(fused.layers))
    bandwidth = copy_bandwidth(torch.device(device))
    where = torch.cuda.get_device_name() if device == "cuda" else "a CPU, interpreted: NO FIGURES OF A GPU"
    print(f"{shape}, batch 1, bfloat16, {prompt} + {new_tokens} tokens, median of {rounds} rounds, on {where}\n")
    print(f"- FFNs skipped: {skipped:.3f} (asked for: {ratio}); compensation: {compensation:.2f} of an FFN's sizes")
    print(f"- copy bandwidth: {bandwidth / 1e9:.0f} GB/s, counting bytes read and written")
    print(f"- relative error of the dense step's logits against the model's: {error:.1e}\n")
    print("| way | ms per token | tokens/s | spread, ms | bytes of weights at the copy bandwidth, ms | of that bound |")
    print("|---|---|---|---|---|---|")
    for name, values in times.items():
        median = statistics.median(values)
        bound = weight_bytes(fused, skip, skipped if "skipping" in name else 0.0) / bandwidth
        spread = f"{min(values) * 1e3:.2f}-{max(values) * 1e3:.2f}"
        figures = f"{median * 1e3:.3f} | {1 / median:.1f} | {spread} | {bound * 1e3:.3f} | {bound / median:.0%}"
        print(f"| {name} | {figures} |")


def build_model(shape: dict[str, Any], length: int, device: torch.device) -> Any:
    """A Llama with random weights in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, max_position_embeddings=max(4096, length), eos_token_id=None, dtype="bfloat16")
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return model


def random_skip(fused: FusedModel, ratio: float, share: float) -> FusedSkip:
    """Probes and compensations of random numbers that skip about `ratio` of all FFNs."""
    hidden, intermediate, device = fused.hidden, fused.intermediate, fused.device
    rank, neurons = max(1, int(share * hidden)), max(1, int(share * intermediate))

    def matrix(rows: int, columns: int) -> Matrix:
        return plain(torch.randn(rows, columns, device=device, dtype=torch.bfloat16) / 50)

    layers = [
        FusedCompensation(
            probe=torch.randn(hidden, device=device) / hidden**0.5,  # of a normed vector it gives about a normal number
            probe_bias=-statistics.NormalDist().inv_cdf(ratio),
            first=matrix(rank, hidden),
            second=matrix(hidden, rank),
            neurons=torch.randperm(intermediate, device=device)[:neurons].int(),
            down=matrix(hidden, neurons),
            bias=torch.zeros(hidden, device=device),
        )
        for _ in fused.layers
    ]
    return FusedSkip(
        rule="predicted-damage",
        reads="input",
        threshold=0.0,
        reach=len(layers),
        cold_s=0,
        cold_e=len(layers),
        looked_at=range(len(layers)),
        layers=layers,
    )


def step_of(fused: FusedModel, skip: FusedSkip | None, capacity: int) -> CudaStep:
    """A step with a cache of its own."""
    return CudaStep(fused, KeyValueCache.allocate(fused, 1, capacity, torch.bfloat16), skip)


def read_prompt(step: CudaStep, model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Fill a step's cache; the next token, ``[1]``."""
    from transformers import DynamicCache

    past = DynamicCache()
    with torch.no_grad():
        following: torch.Tensor = model(tokens, past_key_values=past).logits[:, -1].argmax(-1)
    step.cache.fill(past, torch.zeros(1, dtype=torch.int64))
    return following


def seconds_per_token(step: CudaStep, model: Any, tokens: torch.Tensor, new_tokens: int) -> float:
    """Greedy decoding by a step, behind the prompt."""
    yes = torch.ones(1, dtype=torch.bool, device=tokens.device)
    following = read_prompt(step, model, tokens)
    begin = now(tokens.device)
    for _ in range(new_tokens):
        following = step(following, ~yes, yes, yes).argmax(-1)
    return (now(tokens.device) - begin) / new_tokens


def generate_seconds(model: Any, tokens: torch.Tensor, new_tokens: int, cache: str | None) -> float:
    """Greedy decoding by `generate`, less what one token takes."""

    def run(length: int) -> float:
        begin = now(tokens.device)
        options = {"max_new_tokens": length, "do_sample": False, "cache_implementation": cache}
        model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        return now(tokens.device) - begin

    return (run(new_tokens + 1) - run(1)) / new_tokens


def relative_error(step: CudaStep, model: Any, tokens: torch.Tensor) -> float:
    """Of the logits of the token behind the prompt."""
    yes = torch.ones(1, dtype=torch.bool, device=tokens.device)
    following = read_prompt(step, model, tokens)
    with torch.no_grad():
        expected = model(torch.cat([tokens, following[None]], dim=1)).logits[:, -1].float()
    return float((step(following, ~yes, yes, yes) - expected).norm() / expected.norm())


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written, median of 20."""
    source = torch.ones((2**30 if device.type == "cuda" else 2**26) // 4, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(20):
        begin = now(device)
        target.copy_(source)
        seconds.append(now(device) - begin)
    return 2 * source.nbytes / statistics.median(seconds)


def weight_bytes(fused: FusedModel, skip: FusedSkip, skipped: float) -> float:
    """Bytes of weights that a token reads where this share of the FFNs is skipped."""
    layer, compensation = fused.layers[0], skip.layers[0]
    assert compensation.down is not None
    ffn = layer.gate_up.nbytes + layer.down.nbytes
    factors = (compensation.first, compensation.second, compensation.down)
    added = sum(matrix.nbytes for matrix in factors if matrix)
    added += layer.gate_up.nbytes * compensation.down.columns // fused.intermediate  # the neurons' rows of gate and up
    per_layer = layer.qkv.nbytes + layer.out.nbytes + (1 - skipped) * ffn + skipped * added
    return len(fused.layers) * per_layer + fused.head.nbytes


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    typer.run(main)
