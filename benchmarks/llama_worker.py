"""llama.cpp, one decode at a time: reads a prompt as JSON from stdin, prints when each token came, until stdin ends.

    python llama_worker.py MODEL.gguf FORMAT THREADS CONTEXT

needs llama-cpp-python and nothing else; started by decode_speed.py. Converts the GGUF to F16 or Q8_0 beside itself.
"""

import ctypes
import json
import sys
import tempfile
import time
from pathlib import Path

import llama_cpp

FILE_TYPES = {"F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16, "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}


def converted(gguf: Path, file_type: int, folder: str) -> Path:
    """The model's matrices in another format, rounded from the ones it has."""
    target = Path(folder) / "model.gguf"
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    parameters.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(gguf).encode(), str(target).encode(), ctypes.byref(parameters)) != 0:
        raise SystemExit(f"llama.cpp could not convert {gguf}")
    return target


def main(gguf: str, format: str, threads: str, context: str) -> None:
    """Serve one decode per line."""
    with tempfile.TemporaryDirectory() as folder:
        path = converted(Path(gguf), FILE_TYPES[format], folder) if format in FILE_TYPES else Path(gguf)
        model = llama_cpp.Llama(
            str(path), n_ctx=int(context), n_threads=int(threads), n_threads_batch=int(threads), verbose=False
        )
        for line in sys.stdin:
            request = json.loads(line)
            model.reset()
            tokens = model.generate(request["prompt"], temp=0.0, repeat_penalty=1.0)
            times = [(next(tokens), time.perf_counter())[1] for _ in range(request["new_tokens"])]
            print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
