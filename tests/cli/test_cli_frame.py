"""The command line as a whole: help, exit codes, and what goes to stdout and what to stderr."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from support.cli import mistake, run
from support.factories import make_compensated, make_profile
from support.sentences import OUT_OF_MEMORY
from typer.testing import CliRunner, Result

from ffnskip.errors import FfnskipError
from ffnskip.profiles.profile import save_profile
from ffnskip_cli import console
from ffnskip_cli.app import Frame
from ffnskip_cli.calibration.settings import Settings

COMMANDS = ["calibrate", "apply", "generate", "bench", "eval", "serve", "exec", "compare-text", "pack"]
COMMANDS += ["profiles", "inspect", "card", "validate", "diff"]


def run_command_that(raises: BaseException, logs: Sequence[str] = ()) -> Result:
    failing = typer.Typer(cls=Frame, pretty_exceptions_enable=False, rich_markup_mode=None)

    @failing.callback()
    def group() -> None: ...

    @failing.command()
    def fail() -> None:
        print("data")
        for sentence in logs:
            logging.getLogger("ffnskip.fast.any").info(sentence)
        raise raises

    return CliRunner().invoke(failing, ["fail"])


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_help_is_shown_without_a_command_and_on_request_and_lists_the_commands_in_the_order_of_their_use() -> None:
    for arguments in ((), ("--help",), ("-h",), *((command, "--help") for command in COMMANDS)):
        result = run(*arguments)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.startswith(f"Usage: ffnskip {arguments[0] if len(arguments) > 1 else '[OPTIONS]'} ")
    lines = [line for line in run("--help").stdout.partition("Commands:\n")[2].splitlines() if line.strip()]
    assert [line.split()[0] for line in lines] == COMMANDS
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)  # no sentence is cut off


def test_the_package_runs_as_a_module_and_gives_its_version() -> None:
    result = python("-m", "ffnskip_cli", "--version")
    assert (result.returncode, result.stdout) == (0, "ffnskip 0.1.0\n")


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a profile that has no weights and one that has."""
    folder = tmp_path_factory.mktemp("profiles")
    save_profile(make_profile(), folder / "plain.yaml")
    save_profile(make_compensated("mean", rule="predicted-damage", threshold=0.01), folder / "weights.yaml")
    return folder


@pytest.mark.parametrize(
    "command_lines",
    [
        [[], ["--version"], *([command, "--help"] for command in COMMANDS)],
        [["validate", "plain.yaml"]],
        [["inspect", "plain.yaml"], ["inspect", "weights.yaml"]],
        [["card", "plain.yaml"], ["card", "weights.yaml"]],
        [["diff", "plain.yaml", "plain.yaml"], ["diff", "plain.yaml", "weights.yaml"]],
    ],
    ids=["help", "validate", "inspect", "card", "diff"],
)
def test_what_looks_at_no_weights_does_not_wait_for_torch(
    command_lines: list[list[str]], on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(on_disk)
    imported = modules_after(command_lines)
    assert imported.isdisjoint({"torch", "transformers", "datasets", "matplotlib"})


def test_a_command_imports_no_other_command() -> None:
    imported = {name for name in modules_after([["bench", "--help"]]) if name.startswith("ffnskip_cli.commands.")}
    assert "ffnskip_cli.commands.bench" in imported
    assert not [name for name in imported if "calibrate" in name]


def modules_after(command_lines: list[list[str]]) -> set[str]:
    """The modules that these commands, which succeed and say nothing on stderr, have imported."""
    code = f"""
import sys
from typer.testing import CliRunner
from ffnskip_cli.app import app
for arguments in {command_lines}:
    assert CliRunner().invoke(app, arguments).exit_code == 0, arguments
print(*sys.modules)
"""
    result = python("-c", code)
    assert result.stderr == ""
    return set(result.stdout.split())


@pytest.mark.parametrize("earlier", ["import transformers", "import transformers.modeling_utils, scipy.stats"])
def test_a_command_runs_in_a_process_that_has_used_transformers(earlier: str, pico_folder: Path) -> None:
    program = f"""
{earlier}
import sys
from typer.testing import CliRunner
from ffnskip_cli.app import app
result = CliRunner().invoke(app, ["generate", {str(pico_folder)!r}, "hi", "--max-new-tokens", "1"])
import scipy.stats
sys.exit(result.output if result.exit_code else 0)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr


def test_settings_in_python_are_those_of_the_command_line() -> None:
    help = run("calibrate", "--help").stdout
    options = [field for field in fields(Settings) if field.name not in ("goals", "on")]
    for field in options:
        shown = re.search(rf"--{field.name.replace('_', '-')} .*?\[default:\s+([^;\]\s]*)", help, re.DOTALL)
        if field.default is not None:
            assert shown.group(1) == str(field.default)


@pytest.mark.parametrize(
    ("arguments", "mistake", "where"),
    [
        (["inspect"], "Missing argument 'PROFILE'.", "ffnskip inspect"),
        (["inspect", "p.yaml", "--colour"], "No such option", "ffnskip inspect"),
        (["inspect", "p", "--format", "xml"], "Invalid value for '--format': 'xml' is not one of", "ffnskip inspect"),
        (["inspekt"], "No such command 'inspekt'.", "ffnskip"),
    ],
)
def test_a_mistyped_command_line_is_one_sentence_and_where_to_look(
    arguments: list[str], mistake: str, where: str
) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    sentence, advice = result.stderr.splitlines()
    assert sentence.startswith(f"Error: {mistake}")
    assert advice == f"Try '{where} --help'."


def test_a_mistake_of_the_user_is_its_sentence_and_an_interrupt_says_nothing() -> None:
    sentence = "no such [model]: " + "name a folder " * 20
    result = run_command_that(raises=FfnskipError(sentence))
    assert (result.exit_code, result.stdout, result.stderr) == (2, "data\n", f"Error: {sentence}\n")
    result = run_command_that(raises=KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "")


def test_what_the_runtime_logs_is_said_once_while_a_command_runs(caplog: pytest.LogCaptureFixture) -> None:
    result = run_command_that(raises=FfnskipError("no"), logs=["It takes [long] …"])
    assert result.stderr == "It takes [long] …\nError: no\n"
    assert not caplog.records  # as a program's own logging would show them
    assert not logging.getLogger("ffnskip").isEnabledFor(logging.INFO)


@pytest.mark.parametrize("failure", OUT_OF_MEMORY)
@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["calibrate", "m", "--target", "0.1", "--dataset", "demo"], "a smaller --sequence-length, fewer --tokens"),
        (["compare-text", "m", "--dataset", "demo", "--dataset", "self"], "a smaller --sequence-length"),
        (["apply", "m", "p.yaml"], ""),
        (["generate", "m", "Hello"], "a shorter prompt, a smaller --max-new-tokens"),
        (["bench", "m", "--profile", "p.yaml", "--eval-dataset", "demo"], "fewer --prompts, a smaller --prompt-tokens"),
    ],
)
def test_running_out_of_memory_is_a_sentence_that_names_what_to_turn(
    arguments: list[str], advice: str, failure: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise failure

    monkeypatch.chdir(tmp_path)
    save_profile(make_profile(), tmp_path / "p.yaml")
    monkeypatch.setattr("ffnskip_cli.commands.loading.load", fail)
    advice += ", " * bool(advice) + "--dtype bfloat16 or --device-map auto"
    assert mistake(*arguments) == f"{arguments[0]} ran out of memory: try {advice}."
    options = run(arguments[0], "--help").stdout
    assert [name for name in re.findall(r"--[a-z-]+", advice) if name not in options] == []


@pytest.mark.parametrize("failure", [RuntimeError("a bug"), EOFError("a truncated file")])
def test_an_unexpected_failure_keeps_its_traceback_and_is_exit_code_1(failure: Exception) -> None:
    result = run_command_that(raises=failure)
    assert result.exit_code == 1
    assert failure in (result.exception, getattr(result.exception, "__cause__", None))


@pytest.mark.parametrize("rows", [1, 100_000])
def test_a_reader_that_stops_early_is_not_an_error(rows: int) -> None:
    code = f"""
import sys
from ffnskip_cli import app
app.app.command('flood')(lambda: [print('row') for _ in range({rows})] and None)
sys.argv[1:] = ['flood']
app.main()
"""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=buffered) as writer:
        writer.stdout.close()
        assert writer.stderr.read() == b""


def test_a_terminal_without_block_characters_is_not_an_error() -> None:
    code = """
import sys
from ffnskip_cli import app
app.app.command('bar')(lambda: print('\\u2588'))
sys.argv[1:] = ['bar']
sys.stdout.reconfigure(encoding='ascii', errors='strict')
app.main()
"""
    result = python("-c", code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "?\n", "")


@pytest.fixture
def passing_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = 0.0

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("time.monotonic", lambda: now)
    return wait


def test_progress_in_a_log_is_a_line_every_ten_seconds(
    passing_time: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    for step in console.track("abcdef", "measuring [quality]", 6):
        passing_time(4)
        seen.append(step)
    out, err = capsys.readouterr()
    assert (seen, out) == (list("abcdef"), "")
    lines = ["measuring [quality]: 0/6", "measuring [quality]: 3/6, 0:00:12 left", "measuring [quality]: 6/6"]
    assert err.splitlines() == lines


def test_progress_on_a_terminal_is_a_bar_and_stdout_stays_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for step in console.track(range(3), "measuring quality", 3):
        print(step)
    out, err = capsys.readouterr()
    assert out == "0\n1\n2\n"
    assert "measuring quality" in err
    assert "3/3" in err


@pytest.mark.parametrize("say", [console.error, console.warn, console.hint])
def test_talk_is_one_whole_line_on_stderr(say: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    sentence = "ffnskip bench [model] --profile " + "a-long-name/" * 20
    say(sentence)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.partition(": ")[2] == f"{sentence}\n"


def test_what_is_being_done_is_said_before_it_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with console.busy("Loading [model]"):
        out, err = capsys.readouterr()
    assert (out, err) == ("", "Loading [model] …\n")
