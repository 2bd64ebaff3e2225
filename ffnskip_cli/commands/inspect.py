"""`ffnskip inspect`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ffnskip_cli import console

if TYPE_CHECKING:
    from ffnskip.profiles.profile import Profile


def command(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="The skip profile, a YAML file.")],
    format: Annotated[Literal["table", "json", "md"], typer.Option(help="How to print it.")] = "table",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the profile to a .png, .svg, .pdf or .html file.")
    ] = None,
    panels: Annotated[
        str | None,
        typer.Option(
            metavar="PANEL[,PANEL…]",
            help="What to draw: similarity, ratio, kl, first-skip; default: all that the profile holds.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what a skip profile holds.

    First in sentences: what it skips, saves and costs, and why. Then in tables, with how much each layer's feed-forward
    block changes its input.
    """
    from ffnskip.errors import FfnskipError
    from ffnskip.profiles.profile import load_profile
    from ffnskip_cli.report.plot import plot_profile
    from ffnskip_cli.report.tables import print_json

    if panels is not None and not plot:
        raise FfnskipError("--panels chooses what --plot draws: add --plot FILE.")
    loaded = load_profile(profile)
    if plot:
        plot_profile(loaded, plot, panels.split(",") if panels is not None else ())
    if format == "json":
        print_json(loaded.model_dump(mode="json", by_alias=True))
    else:
        _print_page(loaded, format)
    if plot:
        console.talk.print(f"Wrote {plot}.", markup=False)


def _print_page(profile: "Profile", format: Literal["table", "md"]) -> None:
    from ffnskip_cli.report.curve import draw
    from ffnskip_cli.report.summary import sections
    from ffnskip_cli.report.tables import render
    from ffnskip_cli.report.words import explain

    for sentence in explain(profile):
        print(f"- {sentence}" if format == "md" else sentence)
    print()
    for section in sections(profile):
        render(section.rows, section.columns, format, section.title)
        if section.note:
            print(f"{section.note}\n")
    if profile.similarity:
        fence = "```\n" if format == "md" else ""
        print(f"Similarity cos(h, h + FFN(h)) by layer:\n\n{fence}{draw(profile.similarity, profile.skip)}\n{fence}")
