"""What `ffnskip serve` does."""

from __future__ import annotations

import asyncio
from functools import wraps
from pathlib import Path
from typing import Any

import huggingface_hub
import typer
from transformers.utils.import_utils import is_serve_available

from ffnskip.errors import FfnskipError
from ffnskip_cli import console
from ffnskip_cli.commands.serve import Options
from ffnskip_cli.programs import on_every_load
from ffnskip_cli.sources.models import loadable_name


def run(options: Options) -> None:
    """Run the server with the profile on the model that it loads, until Ctrl-C."""
    if not is_serve_available():
        raise FfnskipError("Serving needs more packages: pip install 'ffnskip[serve]'.")
    if options.offline:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    Path(huggingface_hub.constants.HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # which GET /v1/models looks into
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
        try:
            _server()([name, *options.more], standalone_mode=False)
        except Exception as end:
            if type(end).__name__ != "Abort":  # which Ctrl-C becomes: of typer, or of the click that it may bring along
                raise


def _server() -> typer.Typer:
    """The command `transformers serve`, which looks at its port before it loads, and ends all of its threads."""
    from transformers.cli.serve import Serve

    class Server(Serve):
        @wraps(Serve.__init__)  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            _refuse_taken(kwargs["host"], kwargs["port"])
            try:
                super().__init__(*args, **kwargs)
            finally:
                if hasattr(self, "_generation_state"):
                    self._generation_state.shutdown()

    app = typer.Typer(add_completion=False)
    app.command()(Server)
    return app


def _refuse_taken(host: str, port: int) -> None:
    """Raise FfnskipError where the server could not listen, which it would find out only after loading the model."""

    async def listen() -> None:
        (await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port)).close()

    try:
        asyncio.run(listen())  # as the server itself will
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise FfnskipError(f"The server cannot listen ({why}): name another --port or --host.") from error
