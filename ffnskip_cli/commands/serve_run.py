"""What `ffnskip serve` does."""

from transformers.utils.import_utils import is_serve_available

from ffnskip.errors import FfnskipError
from ffnskip_cli import console
from ffnskip_cli.commands.serve import Options
from ffnskip_cli.programs import on_every_load, run_program
from ffnskip_cli.sources.models import loadable_name


def run(options: Options) -> None:
    """Run the server with the profile on the model that it loads, until Ctrl-C."""
    if not is_serve_available():
        raise FfnskipError("Serving needs more packages: pip install 'ffnskip[serve]'.")
    name = loadable_name(options.model, options.offline)
    console.talk.print(f"Requests name the model {name}", highlight=False)
    move = options.move
    with on_every_load(
        options.profile,
        offline=options.offline,
        threshold=move.threshold,
        target=move.target,
        other_weights=options.other_weights,
    ):
        run_program(["python", "-m", "transformers.cli.transformers", "serve", name, *options.more])
