"""Compile the CPU's decode step on first use, for the processor that it runs on.

One C++ file without dependencies, compiled by whatever compiler is there and kept in the cache folder, under a name
that holds a hash of the source, the compiler, its options and the system: machines that share a home folder do not
share code that only one of them can run.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

from ffnskip.cached import build_once, cache_dir, discard
from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.fast.structs import declare

_SOURCES = Path(__file__).parent / "cpp"
_MAIN = "step.cpp"
# Not -ffast-math: at load it would switch off denormal numbers for the whole process. Vector code is explicit instead.
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-shared", "-fPIC")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")  # whatever has the first has the others
# Products of integers and their sums in one instruction; only prompts are read with wider vectors.
_VNNI = ("-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=256")
_THREADS = ("-fopenmp",)  # torch's own threads; a compiler that knows no such option builds a step for one thread
_TIMEOUT = 300  # seconds; it takes ten to ninety

_log = logging.getLogger(__name__)


def step_library() -> ctypes.CDLL:
    """The shared library of ``cpp/step.cpp``.

    Raises:
        UnsupportedModelError: there is no C++ compiler, it cannot compile the step, or the step does not
            fit this Python code.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise UnsupportedModelError(loaded)
    return loaded


def step_key() -> str:
    """Names the library: another for another source, compiler, processor or system; raises as `step_library`."""
    return Path(step_library()._name).parent.name


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none; tried once per process."""
    installed = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or ([installed] if installed else [])
    except ValueError as error:
        return f"CXX names no compiler ({error}): mend or unset it, for faster decoding."
    if sys.platform == "win32" or not compiler:
        return "No C++ compiler was found: install one, such as g++, for faster decoding."
    flags = (*_FLAGS, *_vector_flags())
    try:
        key = _key(compiler, flags)
        folder = build_once(cache_dir() / "native" / key, lambda into: _compile(compiler, flags, into / "step.so"))
    except UnsupportedModelError as error:
        return str(error)
    except (FfnskipError, OSError, subprocess.SubprocessError) as error:
        return f"There is no native decode step, which is several times faster: {error}"
    try:
        return declare(ctypes.CDLL(str(folder / "step.so")))
    except UnsupportedModelError as error:
        return str(error)
    except (OSError, AttributeError) as error:
        discard(folder)  # or it would be found again
        return f"What {compiler[0]} made of the native decode step in {folder} cannot be loaded: {error}"


def _vector_flags() -> tuple[str, ...]:
    capability: str = torch.backends.cpu.get_cpu_capability()
    if "AVX2" not in capability and "AVX512" not in capability:
        return ()
    return (*_AVX2, *(_VNNI if torch.cpu._is_vnni_supported() else ()))


def _key(compiler: list[str], flags: tuple[str, ...]) -> str:
    asked = subprocess.run([*compiler, "--version"], capture_output=True, timeout=_TIMEOUT)
    version = asked.stdout.decode(errors="replace")
    sources = [path.read_text() for path in sorted(_SOURCES.iterdir()) if path.suffix in (".cpp", ".h")]
    system = [platform.machine(), *platform.libc_ver()]
    return hashlib.sha256("\0".join([*sources, *compiler, version, *flags, *system]).encode()).hexdigest()[:16]


def _compile(compiler: list[str], flags: tuple[str, ...], target: Path) -> None:
    """With as many of the flags as the compiler takes: some know no OpenMP, and old ones no VNNI."""
    _log.info("Compiling the C++ decode step for this processor, once: that may take a minute or two …")
    without_vnni = tuple(flag for flag in flags if flag not in _VNNI)
    for tried in dict.fromkeys((*some, *threads) for some in (flags, without_vnni) for threads in (_THREADS, ())):
        command = [*compiler, *tried, str(_SOURCES / _MAIN), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, timeout=_TIMEOUT)
        if result.returncode == 0 and target.is_file():
            return
    first, *_ = [*result.stderr.decode(errors="replace").strip().splitlines(), "the compiler gives no reason"]
    raise FfnskipError(f"{compiler[0]} could not compile it: {first}")
