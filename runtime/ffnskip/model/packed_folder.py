"""A packed model as a folder, which is loaded without the weights that it was packed from.

The folder has the model's own configuration, the packed tensors in one safetensors file, and `packed.json`, which says
what they are. Folders come from strangers: the file must be a regular one, have the hash that is named and exactly the
tensors that the configuration implies. transformers finds no weights in such a folder, and says so.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from accelerate import init_empty_weights
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ffnskip.errors import FfnskipError
from ffnskip.files import read_regular, sha256_file
from ffnskip.model.matrix import PackedFormat
from ffnskip.model.packed import PackedEmbedding, PackedLinear, pack_shapes
from ffnskip.profiles.fingerprint import keep_fingerprint
from ffnskip.profiles.identity import architecture, model_info
from ffnskip.profiles.schema import Hex64, ModelInfo, Section

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MANIFEST, TENSORS = "packed.json", "packed.safetensors"
_MOST = 2**16  # bytes of the manifest
_HEADER = 2**24  # bytes of the other file that are no numbers
_KEPT = (torch.float32, torch.bfloat16, torch.float16)  # of what is not packed


class Manifest(Section):
    """What a folder says of its weights."""

    layout: Literal["ffnskip-packed/v1"] = "ffnskip-packed/v1"
    """What such a folder looks like."""
    weights: PackedFormat
    """The format of the matrices."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of all that is not packed."""
    sha256: Hex64
    """Of the file with the tensors."""
    model: ModelInfo
    """What was packed, with the fingerprint that its profiles know it by."""


def save_packed(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    id: str,
    revision: str | None = None,
    gguf_sha256: str | None = None,
) -> None:
    """Write a model that `ffnskip.pack_weights` has packed; the tokenizer is not part of it.

    Args:
        model: the model.
        folder: made if it is not there.
        id, revision, gguf_sha256: where it came from, as in a profile.

    Raises:
        FfnskipError: it is not packed, or not to one format, or its code is not that of transformers.
        OSError: the folder cannot be written.
    """
    formats = {module.format for module in model.modules() if isinstance(module, PackedLinear)}
    if not formats:
        raise FfnskipError("The model is not packed: call ffnskip.pack_weights first.")
    embedding = model.get_input_embeddings()
    of_its_own = isinstance(embedding, PackedEmbedding) and embedding.data is not model.get_output_embeddings().data
    if len(formats) > 1 or of_its_own:
        raise FfnskipError("The model is that of a GGUF file, read as it is: keep the file.")
    if not type(model).__module__.startswith("transformers.models."):
        raise FfnskipError("A model with Python code of its own cannot be saved packed.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in _tensors(model)}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and module.by_input:
            tensors[f"{name}.data"] = module.matrix.turned(by_input=False).data.contiguous()
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    manifest = Manifest(
        weights=formats.pop(),  # type: ignore[arg-type]
        dtype=str(model.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        sha256=sha256_file(folder / TENSORS),
        model=model_info(model, id=id, revision=revision, gguf_sha256=gguf_sha256),
    )
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")


def load_packed(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """The model in a folder that `save_packed` wrote, on the CPU, in eval mode without gradients.

    Raises:
        FfnskipError: the folder is not such a one, or is damaged.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder = Path(folder)
    manifest = read_manifest(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if architecture(config, id=manifest.model.id).config_sha256 != manifest.model.config_sha256:
        raise FfnskipError(f"{folder / 'config.json'} is not the configuration that the weights were packed with.")
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, manifest.dtype))
    model.tie_weights()
    pack_shapes(model, manifest.weights)
    _fill(model, _read(folder / TENSORS, manifest.sha256, dict(_tensors(model))))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    if manifest.model.weights_sha256 is not None:
        keep_fingerprint(model, manifest.model.weights_sha256)
    return model.eval().requires_grad_(False)


def read_manifest(folder: Path) -> Manifest:
    """What the folder says of its weights.

    Raises:
        FfnskipError: it cannot be read, or says something else.
    """
    path = folder / MANIFEST
    try:
        data = read_regular(path, _MOST)
        return Manifest.model_validate_json(data or b"")
    except OSError as error:
        raise FfnskipError(f"{path} cannot be read ({error.strerror}).") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FfnskipError(f"{path} does not describe a packed model: {where} {first['msg']}.") from None


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """All that the model's numbers are in, each tensor once: parameters, and buffers that are saved."""
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        owner, _, own = name.rpartition(".")
        if own not in model.get_submodule(owner)._non_persistent_buffers_set:
            yield name, buffer


def _read(path: Path, sha256: str, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors, mapped into memory, if they are those expected, by name, type and shape."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise FfnskipError(f"{path} is no regular file.")
        if found.st_size > 2 * sum(tensor.nbytes for tensor in expected.values()) + _HEADER:
            raise FfnskipError(f"{path} is larger than its tensors can be.")
        if sha256_file(path) != sha256:
            raise FfnskipError(f"{path} is damaged, or another file than {MANIFEST} was written for.")
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FfnskipError(f"{path} cannot be read ({error}).") from None
    if odd := sorted(expected.keys() ^ tensors.keys()):
        what = "is missing" if odd[0] in expected else "is none of the model's"
        raise FfnskipError(f"{path}: the tensor {odd[0]} {what}.")
    for name, tensor in tensors.items():
        empty = expected[name]
        kept = isinstance(empty, nn.Parameter) and tensor.dtype in _KEPT  # some models keep a few in float32
        if tensor.shape != empty.shape or (tensor.dtype != empty.dtype and not kept):
            raise FfnskipError(f"{path}: the tensor {name} has another type or shape than the model's.")
    return tensors


def _fill(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Put tensors in the places of those without numbers, wherever these are shared."""
    numbers = {id(empty): tensors[name] for name, empty in _tensors(model)}
    shared: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if id(buffer) in numbers:
                module._buffers[name] = numbers[id(buffer)]
        for name, parameter in module._parameters.items():
            if parameter is not None:
                filled = nn.Parameter(numbers[id(parameter)], requires_grad=False)
                module._parameters[name] = shared.setdefault(id(parameter), filled)
