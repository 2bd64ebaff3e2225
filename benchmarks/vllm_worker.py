"""Continue texts with vLLM, in an environment that has it; `front_ends.py` starts this.

Reads a JSON object on stdin (model, profile, texts, new_tokens) and writes one to the file named by its argument, as
vLLM itself prints to stdout: the continuations one prompt after the other, those of all at once, the seconds that each
took, and the skip ratio of each.
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
    texts, rows = asked["texts"], []
    llm.generate(texts[:1], SamplingParams(temperature=0.0, max_tokens=2), use_tqdm=False)
    before: dict[str, int] = {}
    for batches in ([[text] for text in texts], [texts]):
        start = time.perf_counter()
        outputs = [output for batch in batches for output in llm.generate(batch, greedy, use_tqdm=False)]
        seconds = time.perf_counter() - start
        (stats,) = llm.collective_rpc("ffnskip_stats")
        skipped = {name: sum(stats[name]) for name in ("skipped", "left_out")} | {"tokens": stats["tokens"]}
        new = {name: count - before.get(name, 0) for name, count in skipped.items()}
        ratio = (new["skipped"] + new["left_out"]) / max(stats["n_layers"] * new["tokens"], 1)
        rows.append({"answers": [o.outputs[0].text for o in outputs], "seconds": seconds, "ratio": ratio})
        before = skipped
        llm.reset_prefix_cache()
    Path(sys.argv[1]).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
