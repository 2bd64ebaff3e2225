"""Models of GGUF files, read as they are, against what was written to them and what transformers makes of them."""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from support.compiler import needs_compiler
from support.gguf_files import write_gguf
from support.pico import pico_model, pico_tokens
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedModel

from ffnskip import Decoder, FfnskipError, save_packed
from ffnskip.model.gguf_model import load_gguf, why_not_as_it_is
from ffnskip.model.matrix import Matrix
from ffnskip.model.packed import PackedEmbedding, PackedLinear
from ffnskip.profiles.fingerprint import weights_sha256

TEXT = pico_tokens(12)
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}
# A size that transformers takes as given, where it does not read it from a file; layers of both kinds.
FAMILIES: dict[str, dict[str, int]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "phi3": {},
    "gemma2": {"query_pre_attn_scalar": 256},
    "gemma3_text": {"query_pre_attn_scalar": 256, "num_hidden_layers": 6},
}
MIXED = {"attn_v": Kind.Q6_K, "ffn_down": Kind.Q6_K, "attn_k": Kind.Q5_0, "output": Kind.Q8_0, "token_embd": Kind.F16}


def mixed(name: str) -> Kind:
    """As the files of llama.cpp that call themselves Q4_K_M mix them, and worse."""
    return next((kind for part, kind in MIXED.items() if f"{part}.weight" in name), Kind.Q4_K)


def all_are(kind: Kind) -> Callable[[str], Kind]:
    return lambda name: kind


def file_of(folder: Path, kind: object, name: str = "llama", **config: object) -> Path:
    return write_gguf(folder / "pico.gguf", family(name, **config), kind)  # type: ignore[arg-type]


def family(name: str, **config: object) -> PreTrainedModel:
    return pico_model(name, **SIZES | FAMILIES[name] | config)


def expanded(file: Path) -> PreTrainedModel:
    """What transformers makes of a file."""
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )


def error(model: PreTrainedModel, other: PreTrainedModel) -> float:
    with torch.no_grad():
        logits, expected = model(TEXT).logits.float(), other(TEXT).logits.float()
    return float((logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_model_that_was_written_to_the_file(name: str, tmp_path: Path) -> None:
    original = family(name, rope_theta=500.0)  # which is no model's default
    file = write_gguf(tmp_path / "pico.gguf", original, all_are(Kind.Q8_0))
    model = load_gguf(file, AutoConfig.from_pretrained(tmp_path, gguf_file=file.name))
    assert error(model, original) < 0.05  # 0.02 to 0.04 by rounding; 0.2 or more if norms, order or rotation are wrong
    for setting in ("rope_parameters", "sliding_window", "layer_types"):
        assert getattr(model.config, setting, None) == getattr(original.config, setting, None)


@pytest.mark.parametrize(("name", "tied"), [*((name, True) for name in FAMILIES), ("llama", False), ("phi3", False)])
@pytest.mark.parametrize("kind", [all_are(Kind.Q4_0), all_are(Kind.Q4_1), mixed], ids=["Q4_0", "Q4_1", "mixed"])
def test_it_is_the_model_that_transformers_makes_of_the_file(
    name: str, tied: bool, kind: object, tmp_path: Path
) -> None:
    file = file_of(tmp_path, kind, name, tie_word_embeddings=tied)
    whole = expanded(file)
    model = load_gguf(file, whole.config)
    assert why_not_as_it_is(file) is None
    assert error(model, whole) < (0.03 if kind is mixed else 0.01)
    assert weights_sha256(model) == weights_sha256(whole)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    if kind is not mixed:
        for matrix, expected in ((m, whole.get_submodule(n)) for n, m in model.named_modules() if hasattr(m, "matrix")):
            assert matrix.format == "int4"
            assert torch.equal(matrix.weight, expected.weight)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@needs_compiler
@pytest.mark.parametrize("kind", [all_are(Kind.Q4_1), mixed], ids=["Q4_1", "mixed"])
def test_it_takes_the_fused_path(kind: object, tmp_path: Path) -> None:
    file = file_of(tmp_path, kind)
    model = load_gguf(file, expanded(file).config)
    decoder = Decoder(model)
    assert decoder.path == "fused"  # whose check compares its logits with the model's
    assert len(list(decoder.decode(TEXT, max_new_tokens=4))) == 4


def test_no_matrix_is_ever_whole_in_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_of(tmp_path, mixed, vocab_size=2000, tie_word_embeddings=False)
    config = expanded(file).config
    largest = []

    def watched(data: object, kind: Kind) -> object:
        largest.append(made.size if (made := dequantize(data, kind)) is not None else 0)
        return made

    dequantize = gguf.quants.dequantize
    monkeypatch.setattr(gguf.quants, "dequantize", watched)
    monkeypatch.setattr("ffnskip.model.gguf_blocks.AT_ONCE", 2**16)
    monkeypatch.delattr(Matrix, "unpack")
    monkeypatch.delattr(AutoModelForCausalLM, "from_pretrained")
    model = load_gguf(file, config)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 2 * 7 + 1
    assert (
        max(largest) <= 512 * 256
    )  # a block for each row of the fingerprint's sample; the head has four times as many


@pytest.mark.parametrize(
    ("kind", "architecture", "reason"),
    [
        (Kind.F16, "llama", "its weights are not quantized"),
        (Kind.Q4_0, "falcon", "files of the architecture 'falcon' are not read as they are"),
    ],
)
def test_other_files_are_not_read_as_they_are(kind: Kind, architecture: str, reason: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "pico.gguf", pico_model(**SIZES), lambda name: kind, architecture=architecture)
    assert why_not_as_it_is(file) == reason


def test_a_file_without_all_tensors_or_with_others_is_refused(tmp_path: Path) -> None:
    file = file_of(tmp_path, all_are(Kind.Q4_0))
    config = expanded(file).config
    config.num_hidden_layers = 3
    with pytest.raises(FfnskipError, match=r"has no tensor for model\.layers\.2\."):
        load_gguf(file, config)
    config.num_hidden_layers, config.intermediate_size = 2, 768
    with pytest.raises(FfnskipError, match=r"gate_proj\.weight has the shape \[512, 256\], not \[768, 256\]"):
        load_gguf(file, config)


@pytest.mark.parametrize("length", [0, 3, 20, 200, 3000, -1000])
def test_a_file_that_is_cut_short_is_not_read(length: int, tmp_path: Path) -> None:
    file = file_of(tmp_path, all_are(Kind.Q4_0))
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises((ValueError, IndexError, OverflowError, struct.error)):
        why_not_as_it_is(file)


def test_it_cannot_be_saved_packed(tmp_path: Path) -> None:
    file = file_of(tmp_path, mixed)
    model = load_gguf(file, expanded(file).config)
    with pytest.raises(FfnskipError, match="is that of a GGUF file, read as it is: keep the file"):
        save_packed(model, tmp_path / "packed", id="pico")
