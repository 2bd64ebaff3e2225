"""Continue texts with vLLM, in an environment that has it; `front_ends.py` starts this.

Reads a JSON object on stdin (model, profile, texts, new_tokens, batch: how many texts at once) and writes one to the
file named by its argument, as vLLM itself prints to stdout: the continuations, the seconds that they took, and the skip
ratio.
"""

import json
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams

# Bytes for keys and values. Unless told, vLLM wants 92 % of the machine's memory, and ends with an error where less
# is free: what started this has a model of its own.
_CACHE = 2**30


def main() -> None:
    """Run what stdin asks for."""
    asked = json.load(sys.stdin)
    config = {"ffnskip_profile": asked["profile"]}
    llm = LLM(
        asked["model"],
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        kv_cache_memory_bytes=_CACHE,
        additional_config=config,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=asked["new_tokens"])
    texts, batch = asked["texts"], asked["batch"]
    llm.generate(texts[:1], SamplingParams(temperature=0.0, max_tokens=2), use_tqdm=False)  # sets things up
    llm.reset_prefix_cache()
    start = time.perf_counter()
    batches = [texts[i : i + batch] for i in range(0, len(texts), batch)]
    outputs = [output for some in batches for output in llm.generate(some, greedy, use_tqdm=False)]
    seconds = time.perf_counter() - start
    (stats,) = llm.collective_rpc("ffnskip_stats")
    left_out = sum(stats["skipped"]) + sum(stats["left_out"])
    ratio = left_out / max(stats["n_layers"] * stats["tokens"], 1)
    row = {"answers": [output.outputs[0].text for output in outputs], "seconds": seconds, "ratio": ratio}
    Path(sys.argv[1]).write_text(json.dumps(row))


if __name__ == "__main__":
    main()
