"""Load a causal language model and its tokenizer by the name that a user gives."""

import contextlib
import io
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode, snapshot_download
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ffnskip.cached import build_once, cache_dir
from ffnskip.errors import FfnskipError, out_of_memory
from ffnskip.files import sha256_file
from ffnskip.hub import commit_of, hub_errors, reason
from ffnskip.model.packed_folder import MANIFEST, load_packed, read_manifest
from ffnskip.profiles.identity import architecture
from ffnskip.profiles.schema import MOST_LAYERS, ModelInfo
from ffnskip.quantizer import FFNSkipQuantizer
from ffnskip_cli.sources.demo import DEMO_MODEL_SHA256, demo_model_file
from ffnskip_cli.sources.devices import check_device_map, parse_device, parse_dtype
from ffnskip_cli.sources.names import looks_like_path, public_name

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
    hash of the `.gguf` file that the weights came from, or None.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str
    revision: str | None = None
    gguf_sha256: str | None = None

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


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    offline: bool = False,
    refuse: Callable[[PretrainedConfig], None] | None = None,
) -> LoadedModel:
    """Load `demo`, a local folder, a `.gguf` file, or `org/name[@revision]` from the Hugging Face Hub.

    `dtype` is auto (as stored), float32, bfloat16 or float16; `device` is auto (cuda if there is one, or else cpu) or a
    torch device. `device_map` (auto, balanced or sequential) has accelerate spread the weights over all devices, the
    CPU and the disk instead. Only safetensors and GGUF weights are read, GGUF as bfloat16, and folders of `ffnskip
    pack` as they are. `refuse` is shown the configuration before any weights are loaded. Raises FfnskipError for
    anything that cannot be loaded.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    torch_dtype, torch_device = parse_dtype(dtype), parse_device(device)
    check_device_map(device_map, device)
    located = _locate(name, revision, [*_HUB_FILES, *["*.py"] * trust_remote_code], offline)
    # Everything is on disk by now, except code that a model's config borrows from a second repository.
    options = {"trust_remote_code": trust_remote_code, "local_files_only": offline or not trust_remote_code}
    config = _check_folder(located.folder, name, options)
    if refuse is not None:
        refuse(config)
    tokenizer = _load_tokenizer(located.folder, name, options)
    packed = _packed_as(located.folder)
    if packed is not None:
        model = _load_packed(located.folder, name, dtype, device_map)
        located = replace(located, id=packed.id, revision=packed.revision, gguf_sha256=packed.gguf_sha256)
    else:
        model = _load_weights(
            located.folder, name, dtype=torch_dtype, device_map=device_map, use_safetensors=True, **options
        )
    if isinstance(getattr(model, "hf_quantizer", None), FFNSkipQuantizer):  # the folder's; commands name their own
        model.hf_quantizer.take_off(model)
    model.config._name_or_path = tokenizer.name_or_path = located.id
    model.eval().requires_grad_(False)
    if device_map is None:
        with _one_sentence(name):
            model.to(torch_device)
    return LoadedModel(model, tokenizer, located.id, located.revision, located.gguf_sha256)


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


def _locate(name: str, revision: str | None, files: list[str], offline: bool) -> _Located:
    base, _, at_revision = name.partition("@")
    if name == "demo" or os.path.exists(name):
        if revision:
            raise FfnskipError(f"a revision goes only with a Hub id, and {name} is none: leave --revision out")
        return _locate_local(name, offline)
    if base == "demo" or os.path.exists(base):
        raise FfnskipError(f"a revision goes only with a Hub id, and {base} is none: leave @{at_revision} out")
    if looks_like_path(base, (".gguf",)):
        raise FfnskipError(f"no such file or folder: {name}")
    if revision and at_revision and revision != at_revision:
        raise FfnskipError(f"{name} and --revision {revision} name two revisions: give only one of them")
    return _fetch(base, revision or at_revision or None, files, offline)


def _locate_local(name: str, offline: bool) -> _Located:
    if name == "demo":
        gguf = demo_model_file(offline)
        return _Located(_dequantized(gguf, DEMO_MODEL_SHA256), DEMO_MODEL_ID, gguf_sha256=DEMO_MODEL_SHA256)
    path = Path(os.path.abspath(name))  # a symbolic link keeps its own name: files in the Hub's cache are links
    if path.is_dir():
        return _Located(path, public_name(path))
    if path.suffix.lower() != ".gguf":
        raise FfnskipError(f"{name} is neither a folder nor a .gguf file: name the folder that holds config.json")
    with _one_sentence(name):
        sha256 = sha256_file(path)
    return _Located(_dequantized(path, sha256), public_name(path), gguf_sha256=sha256)


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


def _dequantized(gguf: Path, sha256: str) -> Path:
    """The folder with the weights of `gguf` in bfloat16 and its tokenizer, made once for each content of a file."""

    def build(folder: Path) -> None:
        source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
        # The converter draws progress bars of its own that no setting turns off.
        with _one_sentence(gguf.name), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
            config = GgufConfig(dequantize=True)
            model = _load_weights(gguf.parent, gguf.name, dtype=torch.bfloat16, quantization_config=config, **source)
            _forget_quantization(model)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    return build_once(cache_dir() / "gguf" / f"{sha256}-bfloat16", build)


def _forget_quantization(model: PreTrainedModel) -> None:
    """Without this, transformers refuses to save a model that came from GGUF although its weights are plain now."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _check_folder(folder: Path, name: str, options: dict[str, Any]) -> PretrainedConfig:
    config = _read_config(folder, name, options)
    if not any(folder.glob("*.safetensors")):
        raise FfnskipError(f"{name} has no safetensors weights, and pickled ones are not read: convert them first")
    return config


def _read_config(folder: Path, name: str, options: dict[str, Any]) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise FfnskipError(f"{name} has no config.json: name a folder that save_pretrained wrote, or a .gguf file")
    with _one_sentence(name):
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
    with _one_sentence(f"the tokenizer of {name}"):
        return AutoTokenizer.from_pretrained(folder, **options)


def _packed_as(folder: Path) -> ModelInfo | None:
    """What was packed into the folder; None if it holds no packed model."""
    return read_manifest(folder).model if (folder / MANIFEST).exists() else None


def _load_packed(folder: Path, name: str, dtype: str, device_map: str | None) -> PreTrainedModel:
    for option, value in (("--dtype", None if dtype == "auto" else dtype), ("--device-map", device_map)):
        if value is not None:
            raise FfnskipError(f"{name} is packed, and stays as it is: leave {option} {value} out")
    with _one_sentence(name):
        return load_packed(folder)


def _load_weights(folder: Path, name: str, **options: Any) -> PreTrainedModel:
    """Load the weights and refuse what transformers would let pass: tensors that stay at their random start."""
    with _one_sentence(name):
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
def _one_sentence(name: str) -> Iterator[None]:
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
