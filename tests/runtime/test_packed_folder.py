"""A packed model as a folder: what loads is what was saved, and what is wrong with a folder is one sentence."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.compiler import needs_compiler
from support.pico import pico_model, pico_tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ffnskip import Decoder, FfnskipError, load_packed, pack_weights, save_packed
from ffnskip.fast.families import fuse
from ffnskip.files import sha256_file
from ffnskip.model.packed import PackedEmbedding, PackedLinear
from ffnskip.model.packed_folder import MANIFEST, TENSORS
from ffnskip.profiles.fingerprint import weights_sha256

TEXT = pico_tokens(12)


def packed_model(format: str = "int4", name: str = "llama", **config: object) -> PreTrainedModel:
    model = pico_model(name, intermediate_size=64, **config)
    pack_weights(model, format)  # type: ignore[arg-type]
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_packed(packed_model(), tmp_path / "packed", id="pico")
    return tmp_path / "packed"


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text"])
def test_what_loads_is_what_was_saved(name: str, tied: bool, format: str, tmp_path: Path) -> None:
    model = packed_model(format, name, tie_word_embeddings=tied)
    save_packed(model, tmp_path, id="pico")
    loaded = load_packed(tmp_path)
    assert torch.equal(loaded(TEXT).logits, model(TEXT).logits)
    assert weights_sha256(loaded) == weights_sha256(model)
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    embedding, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding) == tied
    assert not tied or embedding.data.data_ptr() == head.data.data_ptr()


@needs_compiler
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_model_is_saved_the_same_however_its_matrices_lie(format: str, tmp_path: Path) -> None:
    model = pico_model(hidden_size=64, intermediate_size=64, num_key_value_heads=4, head_dim=16)
    pack_weights(model, format)  # type: ignore[arg-type]
    save_packed(model, tmp_path / "rows", id="pico")
    fuse(model, by_input=True)
    save_packed(model, tmp_path / "inputs", id="pico")
    assert (tmp_path / "rows" / TENSORS).read_bytes() == (tmp_path / "inputs" / TENSORS).read_bytes()


def test_a_parameter_that_is_kept_in_float32_is_loaded_so(tmp_path: Path) -> None:
    model = packed_model().to(torch.bfloat16)
    norm = model.model.norm.to(torch.float32)
    save_packed(model, tmp_path, id="pico")
    loaded = load_packed(tmp_path)
    assert (loaded.model.norm.weight.dtype, loaded.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(loaded.model.norm.weight, norm.weight)


def test_no_matrix_is_held_unpacked(folder: Path) -> None:
    loaded = load_packed(folder)
    matrices = [module for module in loaded.modules() if isinstance(module, PackedLinear)]
    assert len(matrices) == 7 * loaded.config.num_hidden_layers + 1
    assert all(parameter.dim() == 1 for name, parameter in loaded.named_parameters() if "embed" not in name)


@needs_compiler
def test_a_loaded_model_takes_the_fused_path(folder: Path) -> None:
    decoders = [Decoder(model) for model in (packed_model(), load_packed(folder))]
    assert [decoder.path for decoder in decoders] == ["fused", "fused"]
    one, other = ([int(t) for t in decoder.decode(TEXT, max_new_tokens=8)] for decoder in decoders)
    assert one == other


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_cast_leaves_packed_numbers_alone(format: str) -> None:
    model = packed_model(format)
    before = [(module.matrix.unpack(torch.float32), module.data) for module in packed(model)]
    model.to(torch.bfloat16).to(torch.float64)
    for module, (numbers, data) in zip(packed(model), before, strict=True):
        assert torch.equal(module.matrix.unpack(torch.float32), numbers)
        assert module.data is data  # an embedding goes on sharing it with the head
    assert model.model.norm.weight.dtype == torch.float64


def packed(model: PreTrainedModel) -> list[PackedLinear | PackedEmbedding]:
    return [module for module in model.modules() if isinstance(module, PackedLinear | PackedEmbedding)]


def test_transformers_finds_no_weights_in_it(folder: Path) -> None:
    with pytest.raises(OSError, match=r"no file named"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_only_a_packed_model_is_saved_so(tmp_path: Path) -> None:
    with pytest.raises(FfnskipError, match=r"not packed: call ffnskip\.pack_weights first"):
        save_packed(pico_model(), tmp_path, id="pico")


def with_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Other tensors, and a manifest that names them."""
    tensors = change(load_file(folder / TENSORS))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / TENSORS)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": sha256_file(folder / TENSORS)}))


DATA, SCALE = "model.layers.0.mlp.gate_proj.data", "model.layers.0.mlp.gate_proj.scale"


@pytest.mark.parametrize(
    ("change", "mistake"),
    [
        (lambda t: {name: t[name] for name in t if name != DATA}, f"the tensor {DATA} is missing"),
        (lambda t: t | {"more": torch.zeros(1)}, "the tensor more is none of the model's"),
        (lambda t: t | {DATA: t[DATA][:-1]}, f"the tensor {DATA} has another type or shape"),
        (lambda t: t | {DATA: t[DATA].view(torch.int8)}, f"the tensor {DATA} has another type or shape"),
        (lambda t: t | {SCALE: t[SCALE].float()}, f"the tensor {SCALE} has another type or shape"),
        (lambda t: t | {"more": torch.zeros(2**23)}, "larger than its tensors can be"),
    ],
)
def test_other_tensors_are_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], mistake: str, folder: Path
) -> None:
    with_tensors(folder, change)
    with pytest.raises(FfnskipError, match=mistake) as caught:
        load_packed(folder)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused(folder: Path) -> None:
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS).write_bytes(data)
    with pytest.raises(FfnskipError, match="is damaged, or another file"):
        load_packed(folder)


def test_another_configuration_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(FfnskipError, match=r"config\.json is not the configuration that the weights were packed with"):
        load_packed(folder)


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_what_is_no_regular_file_is_not_read(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(FfnskipError, match="cannot be read"):
        load_packed(folder)
    os.mkfifo(folder / name)
    with pytest.raises(FfnskipError, match=r"(?i)no regular file"):
        load_packed(folder)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weights": "int2"}', "\x00"])
def test_a_manifest_that_says_something_else_is_one_sentence(text: str, folder: Path) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(FfnskipError, match="does not describe a packed model") as caught:
        load_packed(folder)
    assert "\n" not in str(caught.value)


def in_memory(file: Path) -> int:
    """KiB of a mapped file that count as this process's memory."""
    kib, of_file = 0, False
    for fields in map(str.split, Path("/proc/self/smaps").read_text().splitlines()):
        if not fields[0].endswith(":"):
            of_file = fields[-1] == str(file)
        elif of_file and fields[0] == "Rss:":
            kib += int(fields[1])
    return kib


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what is in memory")
def test_a_model_that_is_laid_out_lets_go_of_its_file_but_not_of_what_was_written_over_it(tmp_path: Path) -> None:
    save_packed(packed_model(vocab_size=2**16, tie_word_embeddings=True), tmp_path, id="pico")
    loaded = load_packed(tmp_path)
    before = in_memory(tmp_path / TENSORS)
    fuse(loaded)
    assert in_memory(tmp_path / TENSORS) < before / 2
    loaded = load_packed(tmp_path)
    mapped = loaded.get_output_embeddings().data.detach()
    mapped.fill_(7)
    fuse(loaded)
    assert bool((mapped == 7).all())
