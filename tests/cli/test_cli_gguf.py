"""GGUF files on the command line: read as they are by what only runs them, and expanded by what does more."""

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from support.cli import mistake, succeed, talk
from support.factories import make_compensated
from support.gguf_files import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from ffnskip.profiles.identity import model_info
from ffnskip.profiles.profile import save_profile
from ffnskip_cli.sources.models import load_model

SHORT = ("abc", "--max-new-tokens", 4)
AS_IT_IS = "is read as it is, with its matrices 49 in int4, 8 in int8."


def write(path: Path, folder: Path, kind: Kind) -> Path:
    """The model in a folder as a file, of that type where rows are made of whole blocks."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return write_gguf(path, model, lambda name: Kind.F16 if "ffn_down" in name else kind, tokenizer)


@pytest.fixture
def file(plateau_folder: Path, tmp_path: Path, own_cache: Path) -> Path:
    return write(tmp_path / "plateau.gguf", plateau_folder, Kind.Q4_1)


def test_generate_reads_it_as_it_is_unless_other_weights_are_asked_for(file: Path, own_cache: Path) -> None:
    said = talk(succeed("generate", file, *SHORT))
    assert said[0] == f"{file} {AS_IT_IS}"
    assert said[1].startswith("dense: 4 tokens, ")
    (described,) = (own_cache / "gguf").iterdir()
    assert not list(described.glob("*.safetensors"))
    for option, value in (("--dtype", "bfloat16"), ("--weights", "int8")):
        assert "as it is" not in succeed("generate", file, *SHORT, option, value).stderr
    assert len(list((own_cache / "gguf").iterdir())) == 2


def test_a_profile_made_on_the_expanded_file_fits(file: Path, tmp_path: Path) -> None:
    loaded = load_model(str(file))
    info = model_info(loaded.model, id=loaded.id, gguf_sha256=loaded.gguf_sha256).model_dump()
    settings = info | {"cold_s": 0, "cold_e": 8, "threshold": 1.0}
    profile = make_compensated("low-rank", rule="predicted-damage", rank=3, neurons=4, **settings)
    save_profile(profile, tmp_path / "damage.yaml")
    for command in (
        ("apply", file, tmp_path / "damage.yaml"),
        ("generate", file, *SHORT, "-p", tmp_path / "damage.yaml"),
    ):
        result = succeed(*command)
        assert AS_IT_IS in result.stderr
        assert "other weights" not in result.stderr


def test_a_file_that_is_not_read_as_it_is_says_why(plateau_folder: Path, tmp_path: Path, own_cache: Path) -> None:
    file = write(tmp_path / "plain.gguf", plateau_folder, Kind.F16)
    said = talk(succeed("generate", file, *SHORT))
    assert said[0] == f"{file} is expanded to bfloat16: its weights are not quantized."


@pytest.mark.parametrize("length", [0, 4, 500, -500])
def test_a_broken_file_is_one_sentence(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])
    assert "plateau.gguf cannot be loaded: " in mistake("generate", file, *SHORT)
