"""`exec` and `serve`: a profile on the models of programs that know nothing of it."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from support.cli import mistake, run, succeed
from support.on_disk import bytes_as_tokens, save_plateau
from support.pico import pico_model, pico_profile
from transformers import AutoModelForCausalLM

from ffnskip import save_profile

PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
prompt = torch.arange(9)[None] + 97
print(model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None).tolist())
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plateau(tmp_path_factory.mktemp("programs") / "model")


@pytest.fixture(scope="module")
def profile(folder: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder)
    save_profile(pico_profile(model, threshold=-1.0, warm_up=4), folder.parent / "p.yaml")
    return folder.parent / "p.yaml"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path / "program.py"


def test_a_program_gets_the_profile_on_what_it_loads(folder: Path, profile: Path, program: Path) -> None:
    dense = run("exec", "--profile", profile, "--threshold", 2, "--", program, folder, 0)
    skipping = run("exec", "--profile", profile, "--", "python", program, folder, 3)
    assert (dense.exit_code, skipping.exit_code) == (0, 3)
    assert dense.stdout != skipping.stdout
    assert "skip_ratio 0.000" in dense.stderr
    assert "over 15 tokens past warm-up" in skipping.stderr
    assert "skip_ratio 0.000" not in skipping.stderr


def test_a_module_is_run_as_python_does(
    folder: Path, profile: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(program.parent)
    result = succeed("exec", "--profile", profile, "--", "python", "-m", "program", folder, 0)
    assert "over 15 tokens past warm-up" in result.stderr


def test_a_program_that_skips_nothing_says_so(folder: Path, profile: Path, program: Path) -> None:
    for ending in ("", "; import sys; sys.exit(0)"):
        program.write_text(f"print('hello'){ending}")
        assert "no model that the profile could be put on" in succeed("exec", "-p", profile, "--", program).stderr
    assert "no model that" in succeed("exec", "-p", profile, "--", "python", "-c", "print('hello')").stderr
    program.write_text(PROGRAM.replace("max_new_tokens=20", "max_new_tokens=3"))
    assert "The profile did nothing" in succeed("exec", "-p", profile, "--", program, folder, 0).stderr


def test_a_model_that_the_profile_does_not_fit_is_left_dense_and_named(
    folder: Path, profile: Path, program: Path, tmp_path: Path
) -> None:
    pico_model("qwen2", vocab_size=258).save_pretrained(tmp_path / "other")
    result = succeed("exec", "-p", profile, "--", program, tmp_path / "other", 0)
    assert "Qwen2ForCausalLM is loaded without the profile" in result.stderr


def test_what_cannot_be_run_is_refused(profile: Path, tmp_path: Path) -> None:
    assert mistake("exec", "-p", profile, "--", "no-such-program") == "There is no program no-such-program."
    assert "no Python program" in mistake("exec", "-p", profile, "--", "/bin/sh", "-c", "true")


OURS = ("serve", "MODEL", "--profile", "PROFILE", "--")
THEIRS = ("exec", "--profile", "PROFILE", "--", "transformers", "serve", "MODEL")  # knows nothing of ffnskip


@contextmanager
def server(folder: Path, profile: Path, *command: str) -> Iterator[openai.OpenAI]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"MODEL": str(folder), "PROFILE": str(profile)}
    arguments = [*(names.get(word, word) for word in command), "--port", str(port)]
    log = folder.parent / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "ffnskip_cli", *arguments], stderr=file, stdout=file)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        process.send_signal(signal.SIGINT)
        # exec gives what its program gives, and transformers' command, interrupted, gives one or the other
        assert process.wait(60) in ((0,) if command[0] == "serve" else (0, 1)), log.read_text()
        assert "over " in log.read_text(), log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()


def test_a_port_in_use_is_refused_before_the_model_is_loaded(folder: Path, profile: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", folder, "--profile", profile, "--", "--host", "127.0.0.1", "--port", port)
    assert result.exit_code == 2
    assert "Error: The server cannot listen" in result.stderr.splitlines()[-1]
    assert str(port) in result.stderr
    assert "is loaded" not in result.stderr


@pytest.mark.parametrize(
    "command",
    [OURS, (*OURS, "--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "128"), THEIRS],
    ids=["one-by-one", "continuous-batching", "unmodified"],
)
def test_a_server_skips_and_loses_nothing(folder: Path, profile: Path, command: tuple[str, ...]) -> None:
    tokenizer = bytes_as_tokens()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    settings = {"model": str(folder), "max_tokens": 12, "temperature": 0.0}

    def ask(client: openai.OpenAI, number: int, **more: bool) -> openai.types.chat.ChatCompletion:
        message = {"role": "user", "content": f"number {number}"}
        return client.chat.completions.create(messages=[message], **settings, **more)

    with server(folder, profile, *command) as client:
        alone = ask(client, 3)
        assert alone.usage.completion_tokens > 0
        chunks = [chunk for chunk in ask(client, 3, stream=True) if chunk.choices]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == alone.choices[0].message.content
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda number: ask(client, number), range(16)))
        assert answers[3].choices[0].message.content == alone.choices[0].message.content
        assert all(answer.usage.completion_tokens > 0 for answer in answers)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="another", messages=[{"role": "user", "content": "x"}])
