"""A fused model on disk: what is read back decodes what the model decodes, from the model's own files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.compiler import needs_compiler
from support.pico import pico_model, pico_tokens
from support.price import price_profile
from transformers import PreTrainedModel

from ffnskip import Decoder, Profile, UnsupportedModelError, pack_weights, save_packed
from ffnskip.fast.engine import FusedEngine, Steps
from ffnskip.fast.families import FAMILIES
from ffnskip.fast.fused_decoder import FusedDecoder
from ffnskip.fast.stored import store, stored

pytestmark = needs_compiler

TEXT = pico_tokens(11)
ROUND = {"hidden_size": 64, "intermediate_size": 192, "num_key_value_heads": 4, "head_dim": 16}  # sizes for int4


class Disk:
    """A folder with a model's files, and one with what is stored of it."""

    def __init__(self, path: Path, model: PreTrainedModel, save: Callable[[Path], object]) -> None:
        self.model, self.folder, self.entry = model, path / "model", path / "entry"
        self.entry.mkdir()
        save(self.folder)

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def store(self, profile: Profile | None = None) -> None:
        store(FusedEngine(self.model, profile).fused, self.model, self.files, self.entry)

    def decode(self, profile: Profile | None = None) -> list[int]:
        by_input = profile is not None and profile.skip.by.leaves_out_parts
        fused = stored(self.entry, self.files, by_input=by_input)
        Steps(fused, None).check(self.model)
        return written(FusedDecoder(fused, profile))


def written(decoder: Decoder | FusedDecoder) -> list[int]:
    return [int(token) for token in decoder.decode(TEXT, max_new_tokens=24)]


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    model = pico_model("qwen2", attention_bias=True)
    return Disk(tmp_path, model, model.save_pretrained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_decodes_as_the_model_does(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = pico_model(name, dtype)
    disk = Disk(tmp_path, model, model.save_pretrained)
    expected = written(Decoder(model))
    disk.store()
    assert disk.decode() == expected


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_folders(format: str, tied: bool, tmp_path: Path) -> None:
    model = pico_model(tie_word_embeddings=tied, **ROUND)
    pack_weights(model, format)  # type: ignore[arg-type]
    disk = Disk(tmp_path, model, lambda folder: save_packed(model, folder, id="pico"))
    disk.store()
    assert disk.decode() == written(Decoder(model))


@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_however_the_matrices_lie_both_then_and_now(name: str, format: str | None, tmp_path: Path) -> None:
    model = pico_model(name, **ROUND)
    profile = price_profile(model)
    if format is not None:
        pack_weights(model, format)  # type: ignore[arg-type]
        disk = Disk(tmp_path, model, lambda folder: save_packed(model, folder, id="pico"))
    else:
        disk = Disk(tmp_path, model, model.save_pretrained)
    skipping, dense = written(Decoder(model, profile)), written(Decoder(model))
    assert skipping != dense
    for way in (None, profile):
        disk.store(way)
        assert (disk.decode(profile), disk.decode()) == (skipping, dense)


def test_what_was_skipped_is_counted(disk: Disk) -> None:
    profile = price_profile(disk.model)
    by_model = Decoder(disk.model, profile)
    disk.store()
    alone = FusedDecoder(stored(disk.entry, disk.files, by_input=True), profile)
    assert written(alone) == written(by_model)
    assert alone.stats == by_model.stats
    assert alone.stats.tokens == 23


def test_weights_that_are_not_in_the_files_are_not_stored(disk: Disk) -> None:
    with torch.no_grad():
        disk.model.model.layers[3].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(UnsupportedModelError, match=r"other numbers in model.layers.3.mlp.down_proj.weight"):
        disk.store()
    tensors = load_file(disk.files[0])
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, disk.files[0])
    with pytest.raises(UnsupportedModelError, match=r"no tensor model.layers.2.mlp.up_proj.weight"):
        disk.store()
