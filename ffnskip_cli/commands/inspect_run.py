"""What `ffnskip inspect` does."""

from typing import Literal

from ffnskip.errors import FfnskipError
from ffnskip.profiles.profile import Profile
from ffnskip_cli import console
from ffnskip_cli.commands.inspect import Options
from ffnskip_cli.report.curve import draw
from ffnskip_cli.report.page import sections
from ffnskip_cli.report.plot import plot_profile
from ffnskip_cli.report.tables import print_json, print_sentence, render
from ffnskip_cli.report.words import explain
from ffnskip_cli.sources.profiles import read_profile


def run(options: Options) -> None:
    """Print the profile, and draw it if asked to."""
    format, plot, panels = options.format, options.plot, options.panels
    if panels is not None and not plot:
        raise FfnskipError("--panels chooses what --plot draws: add --plot FILE.")
    profile, _ = read_profile(options.profile)
    if plot:
        plot_profile(profile, plot, panels.split(",") if panels is not None else ())
    if format == "json":
        print_json(profile.model_dump(mode="json", by_alias=True))
    else:
        _print_page(profile, format)
    if plot:
        console.talk.print(f"Wrote {plot}.", markup=False)


def _print_page(profile: Profile, format: Literal["table", "md"]) -> None:
    for sentence in explain(profile):
        print_sentence(sentence, format)
    print()
    for section in sections(profile):
        render(section.rows, section.columns, format, section.title)
        if section.note:
            print(f"{section.note}\n")
    if profile.similarity and not profile.skip.by.leaves_out_parts:  # which has little to do with whole FFNs
        fence = "```\n" if format == "md" else ""
        print(f"Similarity cos(h, h + FFN(h)) by layer:\n\n{fence}{draw(profile.similarity, profile.skip)}\n{fence}")
