"""What `ffnskip exec` does."""

from ffnskip_cli.commands.exec import Options
from ffnskip_cli.programs import on_every_load, run_program


def run(options: Options) -> None:
    """Run the program with the profile on what it loads."""
    move = options.move
    with on_every_load(
        options.profile,
        mode=options.mode,
        threshold=move.threshold,
        target=move.target,
        other_weights=options.other_weights,
    ):
        run_program(options.program)
