"""What `ffnskip card` does."""

from ffnskip.files import replacing
from ffnskip_cli import console
from ffnskip_cli.commands.card import Options
from ffnskip_cli.commands.options import refuse_unwritable
from ffnskip_cli.report.card import card
from ffnskip_cli.sources.profiles import read_profile


def run(options: Options) -> None:
    """Print the section, or write it to the file."""
    if options.output is not None:
        refuse_unwritable(options.output, "--output")
    profile, located = read_profile(options.profile)
    text = card(profile, located.path.name if located.repo is None else located.name)
    if options.output is None:
        print(text, end="")
        return
    with replacing(options.output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    console.talk.print(f"Wrote {options.output}.", markup=False)
