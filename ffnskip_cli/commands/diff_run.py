"""What `ffnskip diff` does."""

from dataclasses import asdict
from pathlib import Path
from typing import Literal

import typer

from ffnskip.profiles.profile import load_profile
from ffnskip_cli.commands.diff import Options
from ffnskip_cli.report.diff import COLUMNS, Change, changes, headlines
from ffnskip_cli.report.tables import markdown, print_json, print_sentence, render


def run(options: Options) -> None:
    """Print how the profiles differ; raises typer.Exit with code 1 if they do and that was asked for."""
    a, b, format = options.a, options.b, options.format
    old, new = load_profile(a, with_weights=False), load_profile(b, with_weights=False)
    differing, said = changes(old, new), headlines(old, new)
    if format == "json":
        document = {"schema": "ffnskip-diff/v1", "a": str(a), "b": str(b), "identical": not differing}
        print_json(document | {"sentences": said, "changes": [asdict(change) for change in differing]})
    else:
        _print_page(a, b, said, differing, format)
    if options.exit_code and differing:
        raise typer.Exit(1)


def _print_page(a: Path, b: Path, sentences: list[str], changes: list[Change], format: Literal["table", "md"]) -> None:
    if format == "md":
        print(f"**A** is {markdown(str(a))}, **B** is {markdown(str(b))}.\n")
    else:
        print(f"A  {a}\nB  {b}\n")
    for sentence in sentences:
        print_sentence(sentence, format)
    print()
    if changes:
        render([change.row() for change in changes], COLUMNS, format)
