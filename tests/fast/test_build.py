"""Compiling the native step: once per machine, and never with half a result."""

import shutil
from collections.abc import Iterator
from ctypes import Structure
from pathlib import Path

import pytest
from support.compiler import needs_compiler

from ffnskip import UnsupportedModelError
from ffnskip.fast import build, structs
from ffnskip.fast.build import _load, step_library

# Without optimisation, which takes most of the ten seconds.
COMPILE = f"""set -- $(echo "$@" | sed s/-O3/-O0/); exec {shutil.which("c++") or shutil.which("g++") or "c++"} "$@\""""


@pytest.fixture(autouse=True)
def afresh(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CXX", compiler(tmp_path / "quick", COMPILE))
    _load.cache_clear()
    yield
    _load.cache_clear()


def compiler(path: Path, commands: str) -> str:
    path.write_text(f"#!/bin/sh\n{commands}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_it_is_compiled_once_and_kept_and_logged_as_it_takes_long(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ffnskip")
    log = tmp_path / "log"
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", f'echo "$*" >> {log}; {COMPILE}'))
    for _ in range(2):
        _load.cache_clear()
        assert step_library().ffnskip_step
        assert len(caplog.messages) == 1
    lines = log.read_text().splitlines()
    assert [line for line in lines if "step.cpp" in line] == [next(line for line in lines if "-shared" in line)]
    assert [path.name for path in own_cache.glob("native/*/[!.]*")] == ["step.so"]


@needs_compiler
def test_a_struct_of_another_size_than_the_librarys_is_refused_by_name() -> None:
    class Layer(Structure):
        _fields_ = structs.Layer._fields_[:-1]

    structs.declare(step_library())
    for wrong in (Layer, type("Unknown", (Structure,), {})):
        with pytest.raises(
            UnsupportedModelError, match=rf"struct {wrong.__name__} has -?\d+ bytes, where ffnskip expects"
        ):
            structs.declare(step_library(), [structs.Matrix, wrong])


@needs_compiler
def test_a_compiler_without_openmp_builds_a_step_for_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = 'case "$*" in *-fopenmp*) exit 1;; esac'
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", f"{refuse}; {COMPILE}"))
    assert step_library().ffnskip_step


@needs_compiler
def test_a_compiler_that_is_older_than_the_processor_builds_a_step_without_its_newest_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_vector_flags", lambda: build._VNNI)
    refuse = 'case "$*" in *vnni*) exit 1;; esac'
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", f"{refuse}; {COMPILE}"))
    assert step_library().ffnskip_step


def test_a_compiler_that_fails_is_named_by_its_first_line(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", "echo 'no such header' >&2; echo more >&2; exit 1"))
    with pytest.raises(
        UnsupportedModelError, match=r"^There is no native decode step, .*cxx could not compile it: no such header$"
    ):
        step_library()
    assert not list(own_cache.glob("native/*"))


@pytest.mark.parametrize("missing", ["/no/such/compiler", "", '"g++'])
def test_no_compiler_is_a_reason(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", missing)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnsupportedModelError, match="compiler"):
        step_library()


@needs_compiler
def test_a_library_that_was_cut_short_is_compiled_anew(own_cache: Path) -> None:
    step_library()
    (library,) = own_cache.glob("native/*/step.so")
    whole = library.read_bytes()
    library.unlink()  # this process still runs the old one
    library.write_bytes(whole[: len(whole) // 2])  # running it would be a bus error
    _load.cache_clear()
    assert step_library().ffnskip_step
    assert len(library.read_bytes()) == len(whole)


@needs_compiler
@pytest.mark.parametrize("loose", ["folder", "file", "above"])
def test_a_library_that_others_could_have_put_there_is_not_run(loose: str, own_cache: Path) -> None:
    step_library()
    (library,) = own_cache.glob("native/*/step.so")
    path = {"folder": library.parent, "file": library, "above": library.parent.parent}[loose]
    path.chmod(0o777)
    _load.cache_clear()
    with pytest.raises(UnsupportedModelError, match=f"{path} is a link, belongs to another user or can be written"):
        step_library()


@pytest.mark.parametrize(
    ("commands", "reason"),
    [
        ("exit 0", "could not compile it: the compiler gives no reason$"),
        ('for out; do :; done; test "$out" = --version || echo rubbish > "$out"', r"in \S+ cannot be loaded: "),
        ("printf '\\377'; exit 1", "could not compile it"),
    ],
    ids=["nothing", "rubbish", "no-utf-8"],
)
def test_what_a_bad_compiler_makes_is_a_reason_and_is_not_kept(
    commands: str, reason: str, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", commands))
    with pytest.raises(UnsupportedModelError, match=reason):
        step_library()
    assert not list(own_cache.glob("native/*"))
