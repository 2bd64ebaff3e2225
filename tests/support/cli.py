"""Running a command in a test."""

import json
import re
from typing import Any

from typer.testing import CliRunner, Result

from ffnskip_cli.app import app

PAPER = ("--rule", "cosine", "--compensate", "none")
SIZES = ("--tokens", 1024, "--eval-tokens", 512, "--sequence-length", 64, "--warm-up", 4)
SMALL = (*SIZES, "--candidates", 0, *PAPER)  # a calibration that takes little time
PROGRESS = re.compile(r".* …|.*: \d+/\d+(, .* left)?|Forward passes at most: .*")


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="ffnskip", input=stdin)


def succeed(*arguments: object, stdin: str | bytes | None = None) -> Result:
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result


def talk(result: Result) -> list[str]:
    """What a command said on stderr, apart from its progress."""
    return [line for line in result.stderr.splitlines() if not PROGRESS.fullmatch(line)]


def mistake(*arguments: object, stdin: str | bytes | None = None) -> str:
    """The sentence, and the only one, with which a command refuses its arguments."""
    result = run(*arguments, stdin=stdin)
    assert (result.exit_code, result.stdout) == (2, ""), result.exception
    (line,) = talk(result)
    assert line.startswith("Error: ")
    return line.removeprefix("Error: ")


def bench_document(*arguments: object) -> dict[str, Any]:
    """What `ffnskip bench` says in JSON."""
    document: dict[str, Any] = json.loads(succeed(*arguments, "--format", "json").stdout)
    return document


def bench_rows(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Its rows by name."""
    return {row["name"]: row for row in document["rows"]}
