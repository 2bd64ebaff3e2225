"""Compile the native decode step on first use, for the processor that it runs on.

One C++ file without dependencies, compiled in seconds by whatever compiler is there and kept in the cache folder. The
name of the result holds a hash of the source, the compiler and the processor's features, so that machines that share
a home folder do not share code that only one of them can run.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from ffnskip.cache_folder import build_once, cache_dir
from ffnskip.errors import FfnskipError, UnsupportedModelError

_SOURCES = Path(__file__).parent / "native"
_MAIN = "step.cpp"
# Not -ffast-math: at load it would switch off denormal numbers for the whole process. Vector code is explicit instead.
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-shared", "-fPIC")
_TARGET = ("-march=native", "-mcpu=native", "")  # the first that the compiler knows
_THREADS = ("-fopenmp", "")  # torch's own threads; without them, one
_TIMEOUT = 300  # seconds; it takes about ten


@cache
def native_library() -> ctypes.CDLL:
    """The compiled step.

    Raises:
        UnsupportedModelError: there is no C++ compiler, or it cannot compile the step.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if sys.platform == "win32" or compiler is None:
        raise UnsupportedModelError("No C++ compiler was found: install one, such as g++, for faster decoding.")
    try:
        folder = build_once(cache_dir() / "native" / _key(compiler), lambda into: _compile(compiler, into))
        return ctypes.CDLL(str(folder / "step.so"))
    except (FfnskipError, OSError, subprocess.SubprocessError) as error:
        raise UnsupportedModelError(f"The fast decode step could not be compiled: {error}") from None


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT).stdout
    parts = [path.read_text() for path in sorted(_SOURCES.iterdir()) if path.suffix in (".cpp", ".h")]
    parts += [" ".join(_FLAGS), version, platform.machine(), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def _compile(compiler: str, folder: Path) -> None:
    message = ""
    for threads in _THREADS:
        for target in _TARGET:
            flags = [flag for flag in (*_FLAGS, target, threads) if flag]
            command = [compiler, *flags, str(_SOURCES / _MAIN), "-o", str(folder / "step.so")]
            result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
            if result.returncode == 0:
                return
            message = message or next(iter(result.stderr.strip().splitlines()), "no message")
    raise FfnskipError(message)
