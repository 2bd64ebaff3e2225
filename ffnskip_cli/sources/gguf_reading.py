"""What transformers makes of a `.gguf` file."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoConfig, AutoTokenizer, GgufConfig, PretrainedConfig, PreTrainedModel

from ffnskip.model.gguf_table import GgufTable
from ffnskip_cli import console
from ffnskip_cli.sources.failures import one_sentence
from ffnskip_cli.sources.weights import load_weights


def describe(path: Path, folder: Path) -> None:
    """Write the configuration and the tokenizer of a file."""
    with one_sentence(path.name), _by_table():
        config = AutoConfig.from_pretrained(path.parent, **_source(path))
        config.vocab_size = config.vocab_size or _vocabulary(path)
        _scale_rotation(config, path)
        config.save_pretrained(folder)
        AutoTokenizer.from_pretrained(path.parent, **_source(path)).save_pretrained(folder)


@contextlib.contextmanager
def _by_table() -> Iterator[None]:
    """Let transformers read by the library's table without a vocabulary, which it takes from the file another way.

    Of the library's own reader's vocabulary it wants but the size, and waits for it twice.
    """
    whole = gguf.GGUFReader
    gguf.GGUFReader = GgufTable
    try:
        yield
    finally:
        gguf.GGUFReader = whole


def _vocabulary(path: Path) -> int:
    """How many tokens there are, of files that do not say it by a number."""
    embedding = next(tensor for tensor in GgufTable(path).tensors if tensor.name == "token_embd.weight")
    return int(embedding.shape[1])


def _scale_rotation(config: PretrainedConfig, path: Path) -> None:
    """Set what transformers does not read of Gemma 3: how slowly layers rotate that see the whole text."""
    fields = GgufTable(path).fields
    kind, factor = (fields.get(f"gemma3.rope.scaling.{name}") for name in ("type", "factor"))
    if factor is not None and (kind is None or kind.contents() == "linear"):
        config.rope_parameters["full_attention"] |= {"rope_type": "linear", "factor": float(factor.contents())}


def expand(path: Path, folder: Path) -> None:
    """Write the weights of a file in bfloat16, with its configuration and tokenizer."""
    console.talk.print(f"Expanding {path.name} to bfloat16, once …", markup=False)
    # The converter draws progress bars of its own that no setting turns off.
    with one_sentence(path.name), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **_source(path))
        config = GgufConfig(dequantize=True)
        model = load_weights(path.parent, path.name, dtype=torch.bfloat16, quantization_config=config, **_source(path))
        _forget_quantization(model)
        _scale_rotation(model.config, path)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _forget_quantization(model: PreTrainedModel) -> None:
    """Without this, transformers refuses to save a model that came from GGUF although its weights are plain now."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _source(path: Path) -> dict[str, Any]:
    return {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
