"""The wheel: what is in it, and that it works in an environment of its own."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", folder, ROOT], check=True)
    (made,) = folder.glob("*.whl")
    return made


def test_it_holds_the_native_sources_the_types_the_tasks_and_the_shared_profiles(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    native = ROOT / "runtime" / "ffnskip" / "fast" / "cpp"
    shared = ROOT / "profiles" / "smollm2-135m-instruct"
    assert {f"ffnskip/fast/cpp/{file.name}" for file in native.iterdir()} <= held
    assert {f"ffnskip/shared_profiles/{shared.name}/{file.name}" for file in shared.iterdir()} <= held
    tasks = ROOT / "ffnskip_cli" / "evaluation" / "tasks"
    assert {f"ffnskip_cli/evaluation/tasks/{file.name}" for file in tasks.glob("*.yaml")} <= held
    assert {"ffnskip/py.typed", "ffnskip_cli/py.typed"} <= held
    assert {name.partition("/")[0].partition("-")[0] for name in held} == {"ffnskip", "ffnskip_cli"}


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, and with the packages of this one behind it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=os.name != "nt")
    scheme = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    python = Path(sysconfig.get_path("scripts", "venv", scheme)) / "python"
    # Behind it by a .pth file, whose folder's own .pth files, such as an editable ffnskip's, are not read.
    (packages / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--ignore-installed", wheel], check=True)
    return folder


def inside(environment: Path, *command: str) -> subprocess.CompletedProcess[str]:
    scripts = Path(sysconfig.get_path("scripts", "venv", {"base": str(environment), "platbase": str(environment)}))
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [scripts / command[0], *command[1:]], capture_output=True, text=True, cwd=environment, env=variables
    )


def test_it_is_the_one_that_is_imported(environment: Path) -> None:
    code = "import ffnskip, ffnskip_cli; print(ffnskip.__file__); print(ffnskip_cli.__file__)"
    for file in inside(environment, "python", "-c", code).stdout.splitlines():
        assert Path(file).is_relative_to(environment)


@pytest.mark.demo
@pytest.mark.usefixtures("demo_model_file")
def test_the_demo_takes_the_profile_that_came_with_it(environment: Path) -> None:
    result = inside(environment, "ffnskip", "generate", "demo", "hi", "--profile", "auto", "--max-new-tokens", "40")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    (chosen,) = [line for line in result.stderr.splitlines() if line.startswith("The profile is ")]
    path = Path(chosen.removeprefix("The profile is "))
    assert path.is_relative_to(environment)
    assert path.name == "flops-0.15.yaml"
    assert "skip_ratio" in result.stderr or "warm-up" in result.stderr
