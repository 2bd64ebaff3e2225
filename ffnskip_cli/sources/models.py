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
from huggingface_hub import is_offline_mode, snapshot_download
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
from ffnskip.files import sha256_file
from ffnskip.hub import commit_of, hub_errors
from ffnskip.model.gguf_model import load_gguf, why_not_as_it_is
from ffnskip.model.packed import PackedLinear
from ffnskip.model.packed_folder import MANIFEST, load_packed, read_manifest
from ffnskip.profiles.identity import architecture
from ffnskip.profiles.schema import MOST_LAYERS, ModelInfo
from ffnskip.quantizer import FFNSkipQuantizer
from ffnskip_cli.sources.demo import DEMO_MODEL_SHA256, demo_model_file
from ffnskip_cli.sources.devices import check_device_map, parse_device, parse_dtype
from ffnskip_cli.sources.gguf_files import described, expanded
from ffnskip_cli.sources.names import looks_like_path, public_name
from ffnskip_cli.sources.weights import load_weights, one_sentence

DEMO_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_VOCABULARIES = ["tokenizer.json", "*.model", "*.tiktoken", "*vocab*"]
_HUB_CONFIG = ["*config*.json"]
_HUB_FILES = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.tiktoken", "*.txt"]
# Sub-folders hold other formats, and consolidated*.safetensors the same weights once more under other names.
_HUB_EXTRAS = ["*/*", "consolidated*.safetensors"]


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode without gradients, its tokenizer, and what identifies the pair to others.

    `id` is a Hub id or a base name, never a path; `revision` a Hub commit (40 hex digits) or None; `gguf_sha256` the
    hash of the `.gguf` file that the weights came from, or None. `note` is a sentence on how that was read, if there
    is anything to say.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str
    revision: str | None = None
    gguf_sha256: str | None = None
    note: str | None = None

    @property
    def placement(self) -> str:
        """Where the weights lie, such as `cuda:1`, or `cuda:0, cpu, disk` when a device map has spread them."""
        spread = getattr(self.model, "hf_device_map", {"": self.model.device})
        devices = [device if device == "disk" else str(torch.device(device)) for device in spread.values()]
        return ", ".join(dict.fromkeys(devices))


@dataclass(frozen=True)
class _Located:
    folder: Path
    id: str
    revision: str | None = None
    gguf_sha256: str | None = None
    gguf: Path | None = None  # that is read as it is
    note: str | None = None


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
    files = [*_HUB_FILES, *["*.py"] * trust_remote_code]
    located = _locate(name, revision, files, offline, gguf_as_is and torch_device.type == "cpu")
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
    return LoadedModel(model, tokenizer, located.id, located.revision, located.gguf_sha256, located.note)


def describe_model(name: str, *, revision: str | None, trust_remote_code: bool, offline: bool) -> ModelInfo:
    """What a profile says of a model, as far as it is known without its weights; a Hub's are not fetched.

    Raises FfnskipError for what `load_model` would refuse by its name or configuration.
    """
    transformers_logging.set_verbosity_error()
    located = _locate(name, revision, [*_HUB_CONFIG, *["*.py"] * trust_remote_code], offline)
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
    return str(_locate_local(name, offline).folder) if in_gguf else name


def _locate(name: str, revision: str | None, files: list[str], offline: bool, gguf_as_is: bool = False) -> _Located:
    base, _, at_revision = name.partition("@")
    if name == "demo" or os.path.exists(name):
        if revision:
            raise FfnskipError(f"a revision goes only with a Hub id, and {name} is none: leave --revision out")
        return _locate_local(name, offline, gguf_as_is)
    if base == "demo" or os.path.exists(base):
        raise FfnskipError(f"a revision goes only with a Hub id, and {base} is none: leave @{at_revision} out")
    if looks_like_path(base, (".gguf",)):
        raise FfnskipError(f"no such file or folder: {name}")
    if revision and at_revision and revision != at_revision:
        raise FfnskipError(f"{name} and --revision {revision} name two revisions: give only one of them")
    return _fetch(base, revision or at_revision or None, files, offline)


def _locate_local(name: str, offline: bool, gguf_as_is: bool = False) -> _Located:
    if name == "demo":
        gguf = demo_model_file(offline)
        return _Located(expanded(gguf, DEMO_MODEL_SHA256), DEMO_MODEL_ID, gguf_sha256=DEMO_MODEL_SHA256)
    path = Path(os.path.abspath(name))  # a symbolic link keeps its own name: files in the Hub's cache are links
    if path.is_dir():
        return _Located(path, public_name(path))
    if path.suffix.lower() != ".gguf":
        raise FfnskipError(f"{name} is neither a folder nor a .gguf file: name the folder that holds config.json")
    with one_sentence(name):
        sha256 = sha256_file(path)
        why_not = why_not_as_it_is(path) if gguf_as_is else None
    if gguf_as_is and why_not is None:
        return _Located(described(path, sha256), public_name(path), gguf_sha256=sha256, gguf=path)
    note = why_not and f"{name} is expanded to bfloat16: {why_not}."
    return _Located(expanded(path, sha256), public_name(path), gguf_sha256=sha256, note=note)


def _formats(model: PreTrainedModel) -> str:
    """How many matrices of a packed model are in which format."""
    formats = Counter(module.format for module in model.modules() if isinstance(module, PackedLinear))
    return ", ".join(f"{n} in {format}" for format, n in sorted(formats.items()))


def _fetch(name: str, revision: str | None, files: list[str], offline: bool) -> _Located:
    """Download what is missing of a Hub repository, of the files wanted; the snapshot folder is named by its commit."""
    offline = offline or is_offline_mode()
    with hub_errors("model", name, offline):
        if not offline:
            commit_of("model", name, revision)  # fails in seconds where the download would wait for ever
        folder = snapshot_download(
            name,
            revision=revision,
            local_files_only=offline,
            allow_patterns=files,
            ignore_patterns=_HUB_EXTRAS,
        )
    return _Located(Path(folder), name, revision=Path(folder).name)


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
