"""What docs/integrations.md shows is run as it stands there."""

import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.cli import succeed
from support.on_disk import bytes_as_tokens, save_plateau
from support.pico import pico_profile
from transformers import AutoModelForCausalLM

from ffnskip import save_profile

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
BLOCKS = {
    title: re.findall(r"```(python|sh)\n(.*?)```", section, re.DOTALL)
    for title, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}
PROGRAM = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("org/model"), AutoTokenizer.from_pretrained("org/model")
model.generate(**tokenizer("The sky is blue because", return_tensors="pt"), max_new_tokens=60)
"""
TASK = """
task: judge
dataset_path: json
dataset_kwargs: {data_files: FILE}
test_split: train
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: " and so on"
metric_list: [{metric: acc}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(save_plateau(tmp_path / "org" / "model"))
    tokenizer = bytes_as_tokens()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "org" / "model")
    save_profile(pico_profile(model, threshold=0.3, warm_up=4), tmp_path / "profile.yaml")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "judge.yaml").write_text(TASK.replace("FILE", str(tmp_path / "texts.jsonl")))
    (tmp_path / "texts.jsonl").write_text('{"text": "two little fish swim"}\n{"text": "many birds fly"}\n')
    return tmp_path


def words(line: str) -> list[str]:
    program, *arguments = shlex.split(line)
    if program == "ffnskip":
        return [sys.executable, "-m", "ffnskip_cli", *arguments]
    return [sys.executable if program == "python" else program, *arguments]


@pytest.mark.parametrize("title", ["A loop of your own", "model.generate and pipelines", "from_pretrained"])
def test_python(title: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ((_, code),) = BLOCKS[title]
    monkeypatch.chdir(folder)
    exec(code, {})
    *_, ratio = capsys.readouterr().out.split()
    assert 0 < float(ratio) < 1


def test_any_program(folder: Path) -> None:
    ((_, line),) = BLOCKS["Any Python program"]
    done = subprocess.run(words(line), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"skip_ratio 0\.\d+, .* over \d+ tokens", done.stderr)


@pytest.mark.parametrize("number", range(2), ids=["a model of its own", "exec"])
def test_lm_eval(number: int, folder: Path) -> None:
    _, line = BLOCKS["lm-eval"][number]
    done = subprocess.run(words(line), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"judge *\|", done.stdout)
    assert re.search(r"skip_ratio 0\.[0-9]*[1-9]", done.stdout + done.stderr)


def test_eval(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, line = BLOCKS["lm-eval"][2]
    monkeypatch.chdir(folder)
    output = succeed(*shlex.split(line)[1:]).stdout
    assert re.search(r"judge +acc", output)
    assert re.search(r"skip_ratio 0\.[0-9]*[1-9]", output)


def test_a_server(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    line, code = (code.replace("8000", port) for _, code in BLOCKS["A server"])
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(words(line), cwd=folder, stdout=file, stderr=file)
    try:
        while "running on" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        exec(code, {})
        assert capsys.readouterr().out
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert "skip_ratio" in log.read_text()
    finally:
        process.kill()
