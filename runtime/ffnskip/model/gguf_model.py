"""Models of GGUF files as these are: each matrix goes from the file to a packed one, and none is expanded.

transformers knows how tensors are called in such files, and what was done to them on the way there. Of the
architectures below that is nothing, or rows of a matrix were permuted, which moves whole blocks.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor, nn

from ffnskip.errors import FfnskipError
from ffnskip.model.gguf_blocks import FLOATS, Stored
from ffnskip.model.gguf_table import GgufTable
from ffnskip.model.matrix import Matrix
from ffnskip.model.packed import pack_from
from ffnskip.profiles.fingerprint import keep_fingerprint, weights_sha256

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")


def why_not_as_it_is(path: str | os.PathLike[str]) -> str | None:
    """Why `load_gguf` is not for a file, as a clause; None if it is.

    Raises:
        Exception: the file is no GGUF file, or damaged: whatever the `gguf` package raises then.
    """
    file = GgufTable(path)
    if file.architecture not in _ARCHITECTURES:
        return f"files of the architecture {file.architecture!r} are not read as they are"
    if all(tensor.tensor_type in FLOATS for tensor in file.tensors):
        return "its weights are not quantized"
    return None


def load_gguf(path: str | os.PathLike[str], config: PretrainedConfig) -> PreTrainedModel:
    """The model in a GGUF file, on the CPU, in eval mode without gradients; see `ffnskip.model.gguf_blocks`.

    All but its matrices is in bfloat16. It has the fingerprint that it would have if it were expanded to that.

    Args:
        path: the file, one of those for which `why_not_as_it_is` is None.
        config: as transformers reads it from the file.

    Raises:
        FfnskipError: the file has not the tensors that the configuration implies.
        Exception: the file is no GGUF file, or damaged: whatever the `gguf` package raises then.
    """
    from accelerate import init_empty_weights
    from accelerate.utils import set_module_tensor_to_device
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    weights = _Weights(GgufTable(path), model)
    keep_fingerprint(model, weights_sha256(model, weights.look_up))
    pack_from(model, weights.packed)
    for name, parameter in list(model.named_parameters()):
        set_module_tensor_to_device(model, name, "cpu", weights.of(parameter).unpacked().bfloat16())
    return model.eval().requires_grad_(False)


class _Weights:
    """What a file has for the parameters of a model, which has no numbers itself."""

    def __init__(self, file: GgufTable, model: PreTrainedModel) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        self._release = file.release
        self._processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=model.config.to_dict())
        # Shown the parts of a model too, it makes its map anew for each of them, which takes seconds and adds nothing.
        whole = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=lambda: ())
        names = get_gguf_hf_weights_map(whole, self._processor)
        tensors = {names[tensor.name]: tensor for tensor in file.tensors if tensor.name in names}
        self._tensors: dict[int, Any] = {}
        for name, parameter in model.named_parameters():
            if name not in tensors:
                raise FfnskipError(f"The file has no tensor for {name}.")
            shape = tuple(map(int, reversed(tensors[name].shape)))
            if shape != parameter.shape:
                raise FfnskipError(f"The file's {name} has the shape {list(shape)}, not {list(parameter.shape)}.")
            self._tensors[id(parameter)] = tensors[name]

    def of(self, parameter: Tensor) -> Stored:
        """A parameter, as transformers has it and in the blocks of the file."""
        tensor = self._tensors[id(parameter)]
        data = np.asarray(tensor.data)
        if parameter.dim() > 1:
            data = self._processor.process(data, tensor.name).weights
            return Stored(data.view(np.uint8), tensor.tensor_type, tuple(parameter.shape), self._release)
        values = self._processor.process(gguf.quants.dequantize(data, tensor.tensor_type), tensor.name).weights
        return Stored(values.astype(np.float32).view(np.uint8)[None], Kind.F32, tuple(parameter.shape))

    def look_up(self, parameter: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Single numbers, as they are in bfloat16."""
        return self.of(parameter).at(row, column).bfloat16()

    def packed(self, module: nn.Linear | nn.Embedding) -> Matrix:
        """The matrix of a module, and its bias if it has one."""
        bias = getattr(module, "bias", None)
        return self.of(module.weight).packed(None if bias is None else self.of(bias).unpacked())
