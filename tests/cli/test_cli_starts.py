"""What `ffnskip generate` keeps of a model: the next run does the same without transformers, or takes the model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.cli import mistake, succeed, talk
from support.compiler import needs_compiler
from support.on_disk import pieces_as_tokens
from support.pico import pico_model
from support.price import price_profile
from transformers import AutoModelForCausalLM, AutoTokenizer

from ffnskip.profiles.profile import save_profile
from ffnskip_cli.commands import generate_run
from ffnskip_cli.sources.locate import is_current

pytestmark = needs_compiler

PROMPT = "a cab had"
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(["transformers", "accelerate", "huggingface_hub"]))  # cannot be imported
from ffnskip_cli.app import main
main()
"""


@pytest.fixture(autouse=True)
def cache(own_cache: Path) -> Path:
    """With the compiled step of the usual one."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ffnskip"
    if (usual / "native").is_dir():
        shutil.copytree(usual / "native", own_cache / "native")
    return own_cache


@pytest.fixture
def folder(plateau_folder: Path, tmp_path: Path) -> Path:
    """A copy that has been generated with, and has a chat template."""
    folder = Path(shutil.copytree(plateau_folder, tmp_path / "plateau"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)
    generate(folder)
    return folder


def generate(model: object, *options: object, prompt: str = PROMPT, quick: bool = False) -> str:
    result = succeed("generate", model, prompt, *options, "--max-new-tokens", 24)
    assert (f"Loading {model} \u2026" in result.stderr) != quick
    return result.stdout


def figures(model: object, *options: object) -> list[str]:
    """What is said of an answer, without its speed."""
    said = talk(succeed("generate", model, PROMPT, *options, "--max-new-tokens", 24))
    return [line if " tokens/s" not in line else line.partition(" tokens/s")[2] for line in said]


def loaded(model: object, *options: object, prompt: str = PROMPT) -> str:
    """By the model itself: a precision that is asked for is not what is stored, even if it is the same."""
    return generate(model, *options, "--dtype", "float32", prompt=prompt)


@pytest.mark.parametrize(
    "options",
    [(), ("--raw",), ("--temperature", 1, "--seed", 3), ("--threads", 1), ("--offline",), ("--device", "cpu")],
)
@pytest.mark.parametrize("prompt", [PROMPT, "</s>\n\u00fc\U0001f600", "x" * 300])
def test_the_next_run_says_the_same(folder: Path, options: tuple[object, ...], prompt: str) -> None:
    before = torch.get_num_threads()
    try:
        assert generate(folder, *options, prompt=prompt, quick=True) == loaded(folder, *options, prompt=prompt)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("moved", [(), ("--threshold", 0.5), ("--target", 0.25)])
def test_profiles_skip_and_count_the_same(
    folder: Path, plateau_profiles: Path, damage_profile: Path, tmp_path: Path, moved: tuple[object, ...]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    save_profile(price_profile(model, warm_up=4, curve=[[0.02, 0.05, 0.1], [0.6, 0.3, 0.2]]), tmp_path / "price.yaml")
    for path in (plateau_profiles / "0.30.yaml", damage_profile, tmp_path / "price.yaml"):
        options = ("--profile", path, *moved)
        assert generate(folder, *options, quick=True) == loaded(folder, *options)
        assert figures(folder, *options) == figures(folder, *options, "--dtype", "float32")


def test_it_runs_where_transformers_cannot_be_imported(folder: Path, plateau_profiles: Path) -> None:
    for options in ((), ("--profile", plateau_profiles / "0.30.yaml"), ("--temperature", 1, "--top-p", 0.9)):
        arguments = ["generate", folder, PROMPT, "--max-new-tokens", 24, *options]
        command = [sys.executable, "-c", WITHOUT, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stdout == loaded(folder, *options)


def test_a_model_that_has_changed_is_loaded_and_kept_anew(folder: Path) -> None:
    before = generate(folder, quick=True)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    after = generate(folder)
    assert after != before
    assert generate(folder, quick=True) == after
    settings = json.loads((folder / "generation_config.json").read_text())
    (ends,) = AutoTokenizer.from_pretrained(folder)("]")["input_ids"]
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": ends}))
    assert generate(folder) == generate(folder, quick=True) == after[: after.index("]") + 1] + "\n"


def test_files_that_are_written_over_with_their_old_times_are_noticed(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    was, data = file.stat(), bytearray(file.read_bytes())
    data[-2:] = b"\x40\x40"
    file.write_bytes(data)
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (was.st_mtime_ns, was.st_ino)
    generate(folder)


def test_files_that_change_while_they_are_answered_from_are_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "extra.txt").touch()  # so that it is loaded
    own = generate_run._write

    def meanwhile(*args: Any, **options: Any) -> Any:
        answer = own(*args, **options)
        (folder / "extra.txt").write_text("more")
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(generate_run, "_write", meanwhile)
        result = succeed("generate", folder, PROMPT, "--max-new-tokens", 3)
    assert "The next start will take as long: the model's files have changed meanwhile" in result.stderr
    generate(folder)
    generate(folder, quick=True)


def test_other_libraries_and_packages_do_not_believe_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = generate(folder, quick=True)
    with monkeypatch.context() as patch:
        for module in ("quick", "keep"):
            patch.setattr(f"ffnskip_cli.commands.generation.{module}.step_key", lambda: "another")
        assert generate(folder) == text
        assert generate(folder, quick=True) == text
    assert generate(folder) == text
    with monkeypatch.context() as patch:
        patch.setattr("ffnskip_cli.commands.generation.kept.version", lambda package: "0.0.1")
        assert generate(folder) == text
        assert generate(folder, quick=True) == text
    assert generate(folder, quick=True) == text  # others have an entry of their own


@pytest.mark.parametrize("failure", [FileNotFoundError("gone"), SafetensorError("cut short")])
def test_what_fails_under_way_leaves_the_model_to_be_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise failure

    text = generate(folder, quick=True)
    monkeypatch.setattr("ffnskip_cli.commands.generation.quick.stored", fail)
    assert generate(folder) == text


def test_an_answer_stands_though_nothing_can_be_kept(plateau_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("ffnskip_cli.commands.generation.keep.store", full)
    for _ in range(2):
        result = succeed("generate", plateau_folder, PROMPT, "--max-new-tokens", 24)
        assert result.stdout == loaded(plateau_folder)
        assert "The next start will take as long: No space left on device" in result.stderr


def test_a_damaged_entry_is_made_anew(folder: Path, cache: Path) -> None:
    text = generate(folder, quick=True)
    (entry,) = (cache / "starts").iterdir()
    for name in ("vectors.safetensors", "start.json"):
        data = bytearray((entry / name).read_bytes())
        data[-9] ^= 1
        (entry / name).write_bytes(data)
        assert generate(folder) == text
        assert generate(folder, quick=True) == text


@pytest.mark.parametrize(
    "options", [("--dtype", "float32"), ("--weights", "int8"), ("--trust-remote-code",), ("--device-map", "auto")]
)
def test_options_that_ask_for_another_model_load_it(folder: Path, options: tuple[object, ...]) -> None:
    assert generate(folder, *options, quick=False)


def test_compare_loads_the_model(folder: Path, plateau_profiles: Path) -> None:
    result = succeed("generate", folder, PROMPT, "-p", plateau_profiles / "0.05.yaml", "--compare")
    assert f"Loading {folder} \u2026" in result.stderr


def test_mistakes_are_the_same_sentences(folder: Path, plateau_profiles: Path, pico_folder: Path) -> None:
    generate(pico_folder, prompt="a")
    too_long = "The model takes at most 512 tokens, but this needs 527: shorten the prompt or --max-new-tokens."
    assert mistake("generate", folder, PROMPT, "--max-new-tokens", 510, "--raw") == too_long.replace("527", "519")
    profile = ("--profile", plateau_profiles / "0.30.yaml")
    assert "model.n_layers is 8" in mistake("generate", pico_folder, "a", *profile, "--max-new-tokens", 3)


def test_a_prompt_that_the_model_reads_sooner_is_left_to_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = generate(folder, quick=True)
    monkeypatch.setattr("ffnskip_cli.commands.generation.quick._SOON_READ", 3)
    monkeypatch.setattr("ffnskip_cli.commands.generation.quick.read_by_steps", lambda length, dtype: False)
    assert generate(folder) == text
    said = succeed("generate", folder, PROMPT, "--raw", "--max-new-tokens", 3).stderr
    assert "The model itself is loaded: It reads a prompt of 9 tokens sooner itself." in said


def test_packed_folders_start_so_too(folder: Path, tmp_path: Path) -> None:
    succeed("pack", folder, "--weights", "int8", "--output", tmp_path / "packed")
    text = generate(tmp_path / "packed")
    assert generate(tmp_path / "packed", quick=True) == text


def test_models_without_a_step_keep_nothing(folder: Path, cache: Path) -> None:
    before = sorted((cache / "starts").iterdir())
    pico_model("gpt2", vocab_size=258).save_pretrained(folder)
    generate(folder)
    assert "Decoding by the general path" in succeed("generate", folder, PROMPT, "--max-new-tokens", 3).stderr
    assert sorted((cache / "starts").iterdir()) == before


@pytest.mark.parametrize(
    "more",
    [
        {"clean_up_tokenization_spaces": True},
        {"split_special_tokens": True},
        {"chat_template": [{"name": name, "template": "a"} for name in ("rag", "tools")]},
    ],
)
def test_models_whose_tokenizers_do_more_than_their_library_are_loaded_and_tried_once(
    plateau_folder: Path, tmp_path: Path, more: dict[str, object]
) -> None:
    folder = Path(shutil.copytree(plateau_folder, tmp_path / "plateau"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | more))
    assert "Keeping" in succeed("generate", folder, PROMPT, "--raw", "--max-new-tokens", 3).stderr
    assert generate(folder, "--raw")
    assert "Keeping" not in succeed("generate", folder, PROMPT, "--raw", "--max-new-tokens", 3).stderr


def test_tokenizers_of_pieces_and_bytes_print_the_same(tmp_path: Path) -> None:
    model = pico_model(vocab_size=275, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=None)
    model.save_pretrained(tmp_path / "pieces")
    pieces_as_tokens().save_pretrained(tmp_path / "pieces")
    generate(tmp_path / "pieces")
    for seed in range(6):
        options = ("--temperature", 1, "--seed", seed)
        assert generate(tmp_path / "pieces", *options, quick=True) == loaded(tmp_path / "pieces", *options)


def test_what_is_kept_of_models_that_are_gone_is_removed(folder: Path, pico_folder: Path, cache: Path) -> None:
    (entry,) = (cache / "starts").iterdir()
    shutil.rmtree(folder)
    generate(pico_folder, prompt="a")
    assert entry not in (cache / "starts").iterdir()


def test_models_of_the_hub_start_so_while_they_are_the_commit_that_the_hub_names(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--org--pico"
    commits = ["1" * 40, "2" * 40]
    for commit in commits:
        shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[0])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    text = generate("org/pico")
    assert generate("org/pico", quick=True) == generate("org/pico@main", quick=True) == text
    (repository / "refs" / "main").write_text(commits[1])
    assert generate("org/pico") == text
    assert generate("org/pico", quick=True) == text
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *args, **kwargs: SimpleNamespace(sha=commits[1]))
    assert generate("org/pico", quick=True) == text
    assert is_current(repository / "snapshots" / commits[1], "org/pico")
    assert not is_current(repository / "snapshots" / commits[0], "org/pico")
