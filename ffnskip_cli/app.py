"""The `ffnskip` command: its subcommands, and what becomes of a mistake.

A mistake of the user is one sentence on stderr and exit code 2; an unexpected failure is a traceback and exit code 1.
Nothing that this module imports may import torch, so that `ffnskip --help` answers at once.
"""

import errno
import io
import os
import sys
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.main import get_command

from ffnskip.errors import FfnskipError, out_of_memory
from ffnskip_cli import console
from ffnskip_cli.commands.signature import command_of

# In the order of their use. Each is a module of ffnskip_cli.commands with its options, imported when it is asked for,
# and one beside it, NAME_run, with what runs it.
COMMANDS = (
    *("calibrate", "apply", "generate", "bench", "eval", "serve", "exec", "compare-text", "pack"),
    *("profiles", "inspect", "card", "validate", "diff"),
)
USER_MISTAKE = 2
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_MORE_ROOM = ["--dtype bfloat16", "--device-map auto"]
_MEMORY_SAVERS = {  # what helps each command that runs a model when memory runs out
    "calibrate": ["a smaller --sequence-length", "fewer --tokens", *_MORE_ROOM],
    "apply": _MORE_ROOM,
    "pack": ["--dtype bfloat16"],
    "generate": ["a shorter prompt", "a smaller --max-new-tokens", *_MORE_ROOM],
    "eval": ["a smaller --batch-size", *_MORE_ROOM],
    "compare-text": ["a smaller --sequence-length", *_MORE_ROOM],
    "bench": ["fewer --prompts", "a smaller --prompt-tokens", *_MORE_ROOM],
}


class Frame(TyperGroup):
    """A group of commands that reports the user's mistakes in one sentence."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the command line and exit: 0, 1 after a failure, 2 after a mistake, 130 after Ctrl-C."""
        kwargs["standalone_mode"] = False
        try:
            with console.own_warnings(), console.own_news():
                code = super().main(*args, **kwargs)
            print(end="", flush=True)
        except BrokenPipeError:
            code = _forget_stdout()
        except Exception as mistake:
            if not _explain(mistake):
                raise
            code = USER_MISTAKE
        sys.exit(code)

    def invoke(self, ctx: Any) -> Any:  # click's Context, or that of typer's own copy
        """Run the subcommand; raises FfnskipError with advice of its own when memory runs out."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # here, because click would make it a failure
            return _forget_stdout()
        except Exception as failure:
            savers = _MEMORY_SAVERS.get(ctx.invoked_subcommand or "")
            if savers is None or not out_of_memory(failure):
                raise
            advice = f"{', '.join(savers[:-1])} or {savers[-1]}"
            raise FfnskipError(f"{ctx.invoked_subcommand} ran out of memory: try {advice}.") from failure

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of the commands, in the order of --help."""
        return [*COMMANDS, *(name for name in self.commands if name not in COMMANDS)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; None if there is none, after importing all, as one of them may have been meant."""
        for name in (cmd_name,) if cmd_name in (*COMMANDS, *self.commands) else COMMANDS:
            if name not in self.commands:
                single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
                module = f"ffnskip_cli.commands.{name.replace('-', '_')}"
                single.command(name)(command_of(import_module(module).Options, f"{module}_run"))
                self.commands[name] = get_command(single)
        return self.commands.get(cmd_name)


def _explain(mistake: Exception) -> bool:
    """Say what the user did wrong; False when it was not the user."""
    # Known by its method, as the class belongs to click or to typer's own copy of it, depending on typer's version.
    if hasattr(mistake, "format_message"):
        message = mistake.format_message().replace("Value error, ", "")  # pydantic's words inside typer's
        console.error(" ".join(message.split()))
        if context := getattr(mistake, "ctx", None):
            console.talk.print(f"Try '{context.command_path} --help'.", markup=False)
        return True
    if isinstance(mistake, FfnskipError):
        console.error(str(mistake))
        return True
    if isinstance(mistake, OSError) and mistake.errno in _NO_ROOM:
        console.error(f"{mistake.filename or 'The output'} cannot be written: {mistake.strerror}.")
        _forget_stdout()
        return True
    return False


def _forget_stdout() -> int:
    """Let go of what is buffered and cannot be written, or Python would try once more at the end.

    A reader that has gone, such as `head`, is not an error: the exit code is 0.
    """
    with suppress(io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


app = typer.Typer(
    cls=Frame,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"ffnskip {version('ffnskip')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _frame(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Skip feed-forward blocks (FFNs) of a language model for the tokens that can do without, and measure the cost.

    Start with `ffnskip calibrate demo --dataset demo --target-flops 0.15`, which writes a skip profile.
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Entry point of the `ffnskip` script."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without block characters is no reason to fail
    app()
