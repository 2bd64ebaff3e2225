"""`ffnskip diff`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from ffnskip_cli.report.diff import Change


def command(
    a: Annotated[Path, typer.Argument(metavar="A", help="The skip profile as it was.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The skip profile as it is.")],
    format: Annotated[
        Literal["table", "md", "json"], typer.Option(help="How to print it; md is made for a pull request.")
    ] = "table",
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 if the profiles differ.")] = False,
) -> None:
    """Say how two skip profiles differ.

    First in three sentences: what both are for, what B skips and costs beyond A, and how surely, and whether that is
    within the quality budget. Then every field that differs.
    """
    from ffnskip.profiles.profile import load_profile
    from ffnskip_cli.report.diff import changes, headlines

    old, new = load_profile(a), load_profile(b)
    found, said = changes(old, new), headlines(old, new)
    if format == "json":
        _print_json(a, b, said, found)
    else:
        _print_page(a, b, said, found, format)
    if exit_code and found:
        raise typer.Exit(1)


def _print_json(a: Path, b: Path, sentences: list[str], changes: "list[Change]") -> None:
    from dataclasses import asdict

    from ffnskip_cli.report.tables import print_json

    print_json(
        {
            "schema": "ffnskip-diff/v1",
            "a": str(a),
            "b": str(b),
            "identical": not changes,
            "sentences": sentences,
            "changes": [asdict(change) for change in changes],
        }
    )


def _print_page(
    a: Path, b: Path, sentences: list[str], changes: "list[Change]", format: Literal["table", "md"]
) -> None:
    from ffnskip_cli.report.diff import COLUMNS
    from ffnskip_cli.report.tables import render

    if format == "md":
        print(f"**A** is `{a}`, **B** is `{b}`.\n")
    else:
        print(f"A  {a}\nB  {b}\n")
    for sentence in sentences:
        print(f"- {sentence}" if format == "md" else sentence)
    print()
    if changes:
        render([change.row() for change in changes], COLUMNS, format)
