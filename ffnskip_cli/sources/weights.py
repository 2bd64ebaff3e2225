"""Weights as transformers loads them."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from ffnskip.errors import FfnskipError
from ffnskip_cli.sources.failures import one_sentence


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
