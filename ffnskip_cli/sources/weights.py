"""Weights as transformers loads them, and what it raises on the way in one sentence."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from ffnskip.errors import FfnskipError, out_of_memory
from ffnskip.hub import reason


def load_weights(folder: Path, name: str, **options: Any) -> PreTrainedModel:
    """Load the weights and refuse what transformers would let pass: tensors that stay at their random start."""
    with one_sentence(name):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    absent = sorted({*report["missing_keys"], *(tensor for tensor, *_ in report["mismatched_keys"])})
    if absent:
        raise FfnskipError(
            f"the weights of {name} do not fill the model that its config describes: {len(absent)} tensors are missing "
            f"or have another shape, first {absent[0]}"
        )
    return model


@contextlib.contextmanager
def one_sentence(name: str) -> Iterator[None]:
    """Turn whatever transformers raises on a folder or file that it cannot load into one sentence."""
    try:
        yield
    except FfnskipError:
        raise
    except Exception as error:  # a broken folder makes it raise nearly any class
        if out_of_memory(error):
            raise FfnskipError(
                f"{name} does not fit into memory: try --dtype bfloat16, --device-map auto or --device cpu"
            ) from error
        if "trust_remote_code" in str(error):
            raise FfnskipError(
                f"{name} brings its own Python code: pass --trust-remote-code if you trust its authors"
            ) from error
        raise FfnskipError(f"{name} cannot be loaded: {reason(error)}") from error
