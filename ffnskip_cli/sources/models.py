"""Load a causal language model and its tokenizer by the name that a user gives."""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ffnskip.errors import FfnskipError
from ffnskip.model.gguf_model import load_gguf
from ffnskip.model.packed import PackedLinear
from ffnskip.model.packed_folder import MANIFEST, load_packed, read_manifest
from ffnskip.profiles.identity import architecture
from ffnskip.profiles.schema import MOST_LAYERS, ModelInfo
from ffnskip.quantizer import FFNSkipQuantizer
from ffnskip_cli.sources.devices import check_device_map, parse_device, parse_dtype
from ffnskip_cli.sources.failures import one_sentence
from ffnskip_cli.sources.locate import CONFIG_FILES, MODEL_FILES, Folder, locate, locate_local
from ffnskip_cli.sources.weights import load_weights

_VOCABULARIES = ["tokenizer.json", "*.model", "*.tiktoken", "*vocab*"]


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode without gradients, its tokenizer, and what identifies the pair to others.

    `id` is a Hub id or a base name, never a path; `revision` a Hub commit (40 hex digits) or None; `gguf_sha256` the
    hash of the `.gguf` file that the weights came from, or None. `note` is a sentence on how that was read, if there
    is anything to say. `folder` is what it was read from, as it was before, but for GGUF files.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str
    revision: str | None = None
    gguf_sha256: str | None = None
    note: str | None = None
    folder: Folder | None = None

    @property
    def placement(self) -> str:
        """Where the weights lie, such as `cuda:1`, or `cuda:0, cpu, disk` when a device map has spread them."""
        spread = getattr(self.model, "hf_device_map", {"": self.model.device})
        devices = [device if device == "disk" else str(torch.device(device)) for device in spread.values()]
        return ", ".join(dict.fromkeys(devices))


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    offline: bool = False,
    gguf_as_is: bool = False,
    refuse: Callable[[PretrainedConfig], None] | None = None,
) -> LoadedModel:
    """Load `demo`, a local folder, a `.gguf` file, or `org/name[@revision]` from the Hugging Face Hub.

    `dtype` is auto (as stored), float32, bfloat16 or float16; `device` is auto (cuda if there is one, or else cpu) or a
    torch device. `device_map` (auto, balanced or sequential) has accelerate spread the weights over all devices, the
    CPU and the disk instead. Only safetensors and GGUF weights are read, GGUF as bfloat16, and folders of `ffnskip
    pack` as they are; with `gguf_as_is`, on a CPU, files of quantized weights too, where that can be done. `refuse` is
    shown the configuration before any weights are loaded. Raises FfnskipError for anything that cannot be loaded.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    torch_dtype, torch_device = parse_dtype(dtype), parse_device(device)
    check_device_map(device_map, device)
    files = [*MODEL_FILES, *["*.py"] * trust_remote_code]
    as_is = gguf_as_is and torch_device.type == "cpu"
    located = locate(name, revision, files=files, offline=offline, gguf_as_is=as_is)
    with one_sentence(name):
        folder = Folder.seen(located.folder) if located.gguf is None else None
    # Everything is on disk by now, except code that a model's config borrows from a second repository.
    options = {"trust_remote_code": trust_remote_code, "local_files_only": offline or not trust_remote_code}
    config = _read_config(located.folder, name, options)
    if located.gguf is None and not any(located.folder.glob("*.safetensors")):
        raise FfnskipError(f"{name} has no safetensors weights, and pickled ones are not read: convert them first")
    if refuse is not None:
        refuse(config)
    tokenizer = _load_tokenizer(located.folder, name, options)
    packed = _packed_as(located.folder)
    if packed is not None:
        model = _load_packed(located.folder, name, dtype, device_map)
        located = replace(located, id=packed.id, revision=packed.revision, gguf_sha256=packed.gguf_sha256)
    elif located.gguf is not None:
        with one_sentence(name):
            model = load_gguf(located.gguf, config)
        located = replace(located, note=f"{name} is read as it is, with its matrices {_formats(model)}.")
    else:
        model = load_weights(
            located.folder, name, dtype=torch_dtype, device_map=device_map, use_safetensors=True, **options
        )
    if isinstance(getattr(model, "hf_quantizer", None), FFNSkipQuantizer):  # the folder's; commands name their own
        model.hf_quantizer.take_off(model)
    model.config._name_or_path = tokenizer.name_or_path = located.id
    model.eval().requires_grad_(False)
    if device_map is None:
        with one_sentence(name):
            model.to(torch_device)
    return LoadedModel(model, tokenizer, located.id, located.revision, located.gguf_sha256, located.note, folder)


def describe_model(name: str, *, revision: str | None, trust_remote_code: bool, offline: bool) -> ModelInfo:
    """What a profile says of a model, as far as it is known without its weights; a Hub's are not fetched.

    Raises FfnskipError for what `load_model` would refuse by its name or configuration.
    """
    transformers_logging.set_verbosity_error()
    files = [*CONFIG_FILES, *["*.py"] * trust_remote_code]
    located = locate(name, revision, files=files, offline=offline)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": offline or not trust_remote_code}
    config = _read_config(located.folder, name, options)
    return architecture(config, id=located.id, revision=located.revision, gguf_sha256=located.gguf_sha256)


def loadable_name(name: str, offline: bool) -> str:
    """What transformers itself loads a model by: its name, or for `demo` and GGUF files a folder with its weights.

    Raises FfnskipError for a packed folder, which transformers cannot load.
    """
    if (Path(name) / MANIFEST).exists():
        raise FfnskipError(f"{name} is packed, and this command loads models by transformers: name the model itself")
    in_gguf = name == "demo" or (name.lower().endswith(".gguf") and os.path.exists(name))
    return str(locate_local(name, offline).folder) if in_gguf else name


def _formats(model: PreTrainedModel) -> str:
    """How many matrices of a packed model are in which format."""
    formats = Counter(module.format for module in model.modules() if isinstance(module, PackedLinear))
    return ", ".join(f"{n} in {format}" for format, n in sorted(formats.items()))


def _read_config(folder: Path, name: str, options: dict[str, Any]) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise FfnskipError(f"{name} has no config.json: name a folder that save_pretrained wrote, or a .gguf file")
    with one_sentence(name):
        config = AutoConfig.from_pretrained(folder, **options)
    if not _is_causal_lm(config):
        raise FfnskipError(f"{name} is no causal language model (its model type is {config.model_type})")
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if not 1 <= layers <= MOST_LAYERS:
        raise FfnskipError(f"{name} has {layers} layers by its config.json, where 1 to {MOST_LAYERS:,} make sense")
    return config


def _is_causal_lm(config: PretrainedConfig) -> bool:
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    # BERT and its like load as causal models without complaint: only the name of the saved class tells.
    other_task = [c for c in config.architectures or [] if re.search("For(?!CausalLM|ConditionalGeneration)[A-Z]", c)]
    return (known or remote) and not other_task and not getattr(config, "is_encoder_decoder", False)


def _load_tokenizer(folder: Path, name: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    # Without a vocabulary, transformers may build a tokenizer that knows nothing but its special tokens.
    if not any(True for pattern in _VOCABULARIES for _ in folder.glob(pattern)):
        raise FfnskipError(f"{name} has no tokenizer: add its tokenizer.json")
    with one_sentence(f"the tokenizer of {name}"):
        return AutoTokenizer.from_pretrained(folder, **options)


def _packed_as(folder: Path) -> ModelInfo | None:
    """What was packed into the folder; None if it holds no packed model."""
    return read_manifest(folder).model if (folder / MANIFEST).exists() else None


def _load_packed(folder: Path, name: str, dtype: str, device_map: str | None) -> PreTrainedModel:
    for option, value in (("--dtype", None if dtype == "auto" else dtype), ("--device-map", device_map)):
        if value is not None:
            raise FfnskipError(f"{name} is packed, and stays as it is: leave {option} {value} out")
    with one_sentence(name):
        return load_packed(folder)
