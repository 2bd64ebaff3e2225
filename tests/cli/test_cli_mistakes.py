"""Bad input that a user, a folder or a machine can bring: one sentence and exit code 2, before anything slow."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.cli import mistake, run
from support.factories import make_profile

from ffnskip.profiles.profile import save_profile


@pytest.fixture
def changed(pico_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the pico model with other settings in one of its JSON files."""

    def change(file: str = "config.json", **settings: Any) -> Path:
        folder = Path(shutil.copytree(pico_folder, tmp_path / "changed"))
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | settings))
        return folder

    return change


@pytest.mark.parametrize("command", ["apply", "generate", "bench"])
def test_a_bad_profile_is_refused_before_anything_is_started(command: str, tmp_path: Path) -> None:
    between = {"apply": (), "generate": ("hello", "--profile"), "bench": ("--profile",)}[command]
    result = run(command, "nosuch/model", *between, tmp_path / "none.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"Error: {tmp_path / 'none.yaml'}: cannot be read (No such file or directory)\n"


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
@pytest.mark.parametrize("option", ["--output", "--plot", "--stats-out"])
def test_what_cannot_be_written_is_refused_before_anything_is_loaded(option: str, tmp_path: Path) -> None:
    path = Path("/proc/nope") / {"--output": "p.yaml", "--plot": "p.svg", "--stats-out": "p.safetensors"}[option]
    outputs = ("--output", tmp_path / "p.yaml") if option != "--output" else ()
    said = mistake("calibrate", "nosuch/model", "--target", 0.1, *outputs, option, path)
    assert said == f"{path} cannot be written: name another {option}."
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers", [0, 10**7])
def test_a_model_without_layers_or_with_millions_is_refused(layers: int, changed: Callable[..., Path]) -> None:
    assert f"has {layers} layers by its config.json" in mistake("generate", changed(num_hidden_layers=layers), "hello")


def test_an_unknown_name_in_a_model_is_called_one(changed: Callable[..., Path]) -> None:
    said = mistake("generate", changed(hidden_act="nosuch"), "hello")
    assert "the name 'nosuch' is missing or unknown" in said


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('no such role') }}", "fails (no such role): pass --raw."),
        ("{{ messages | nosuch }}", "fails (No filter named 'nosuch'): pass --raw."),
        ("{# nothing #}", "The prompt has no tokens: write more, or pass --raw if the chat template drops it."),
    ],
)
def test_a_chat_template_that_fails_is_one_sentence(template: str, sentence: str, changed: Callable[..., Path]) -> None:
    folder = changed()
    (folder / "chat_template.jinja").write_text(template)
    assert mistake("generate", folder, "hello").endswith(sentence)


def test_a_model_that_computes_no_numbers_writes_no_text(changed: Callable[..., Path]) -> None:
    file = changed() / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= float("nan")
    save_file(tensors, file, {"format": "pt"})
    said = run("generate", file.parent, "hello", "--max-new-tokens", 4).stderr.splitlines()[-1]
    assert said.startswith("Error: The model's predictions are not finite numbers")


def test_a_number_of_many_digits_and_a_name_of_many_letters_are_one_sentence(tmp_path: Path) -> None:
    said = mistake("calibrate", "m", "--target", 0.1, "--warm-up", "9" * 5000)
    assert said.startswith("--warm-up must be a whole number from 0 on, auto, not 999")
    assert len(said) < 200
    assert mistake("validate", tmp_path / ("x" * 300)).endswith("cannot be read (File name too long)")


@pytest.fixture
def page(tmp_path: Path) -> list[str]:
    """A command line that prints more than a pipe holds."""
    paths = [tmp_path / f"{number}.yaml" for number in range(1200)]
    save_profile(make_profile(), paths[0])
    for path in paths[1:]:
        path.hardlink_to(paths[0])
    return [sys.executable, "-m", "ffnskip_cli", "validate", *map(str, paths)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no such device")
def test_output_without_room_is_one_sentence(page: list[str]) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(page, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (2, "Error: The output cannot be written: No space left on device.\n")


@pytest.mark.skipif(os.name == "nt", reason="there are no such pipes")
def test_a_reader_that_has_gone_is_no_error(page: list[str]) -> None:
    with subprocess.Popen(page, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, "")


HOSTILE = "<img src=x> ![a](b) `c` | d"


@pytest.mark.parametrize("command", ["inspect", "diff"])
def test_a_page_shows_what_a_profile_says_and_does_nothing_else(command: str, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.yaml", "b.yaml")]
    save_profile(make_profile(id=HOSTILE), paths[0])
    save_profile(make_profile(id="org/other"), paths[1])
    page = run(command, *paths[: 1 if command == "inspect" else 2], "--format", "md").stdout
    assert "&lt;img src=x&gt; !\\[a\\](b) \\`c\\` \\| d" in page
    assert "<img" not in page
    assert "![a]" not in page
