"""What `ffnskip diff` does."""

from dataclasses import asdict
from typing import Literal

import typer

from ffnskip_cli.commands.diff import Options
from ffnskip_cli.report.diff import COLUMNS, Change, changes, headlines
from ffnskip_cli.report.tables import markdown, print_json, print_sentence, render
from ffnskip_cli.sources.profiles import read_profile


def run(options: Options) -> None:
    """Print how the profiles differ; raises typer.Exit with code 1 if they do and that was asked for."""
    format = options.format
    (old, a), (new, b) = read_profile(options.a), read_profile(options.b)
    differing, said = changes(old, new), headlines(old, new)
    if format == "json":
        document = {"schema": "ffnskip-diff/v1", "a": a.name, "b": b.name, "identical": not differing}
        print_json(document | {"sentences": said, "changes": [asdict(change) for change in differing]})
    else:
        _print_page(a.name, b.name, said, differing, format)
    if options.exit_code and differing:
        raise typer.Exit(1)


def _print_page(a: str, b: str, sentences: list[str], changes: list[Change], format: Literal["table", "md"]) -> None:
    if format == "md":
        print(f"**A** is {markdown(a)}, **B** is {markdown(b)}.\n")
    else:
        print(f"A  {a}\nB  {b}\n")
    for sentence in sentences:
        print_sentence(sentence, format)
    print()
    if changes:
        render([change.row() for change in changes], COLUMNS, format)
