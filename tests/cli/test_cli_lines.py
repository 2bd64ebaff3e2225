"""Command lines drawn at random: a command either works or says in one sentence what is wrong with its arguments."""

from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from support.cli import run
from support.examples import few
from support.factories import make_profile

from ffnskip.profiles.profile import save_profile
from ffnskip_cli.app import COMMANDS, app

VALUES = ["", "0", "1", "-1", "0.5", "1e400", "nan", "auto", "none", "9" * 400, "a/b", "\u202e", "\ud800", "=", "-"]
VALUES += ["p.yaml", "none.yaml", "text.txt", "table", "json", "md", "csv", "cosine", "price", "cpu", "int8", "1/2"]


def options_of(command: str) -> list[str]:
    group = typer.main.get_command(app)
    found = group.get_command(None, command)  # type: ignore[attr-defined]
    return sorted({name for option in found.params for name in option.opts if name.startswith("-")} | {"--nosuch"})


LINES = st.sampled_from(COMMANDS).flatmap(
    lambda command: st.lists(st.sampled_from([*VALUES, *options_of(command)]), max_size=8).map(
        lambda words: [command, *words]
    )
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder, with a profile and a text and no model."""
    monkeypatch.chdir(tmp_path)
    save_profile(make_profile(), "p.yaml")
    Path("text.txt").write_text("a few words")


@few
@given(line=LINES)
@pytest.mark.usefixtures("folder")
def test_a_random_command_line_works_or_is_refused_in_a_sentence(line: list[str]) -> None:
    result = run(*line)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (0, 1, 2)
    if result.exit_code == 2:
        in_json = line[0] == "validate" and '"error": "' in result.stdout
        assert in_json or any(said.startswith("Error: ") for said in result.stderr.splitlines())
        assert "Traceback" not in result.stderr
