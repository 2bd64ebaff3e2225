"""A command, made from the dataclass of its options: the signature that Typer reads, and what runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from importlib import import_module
from inspect import Parameter, Signature
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import ParameterInfo

from ffnskip_cli import console
from ffnskip_cli.imports import swift_imports


def command_of(options: Any, runner: str) -> Callable[..., None]:
    """The command whose options are the fields of a dataclass that are annotated with Typer's, and its help the doc.

    Args:
        options: the dataclass. A field that is a dataclass stands for the options in it. A field `partial[Settings]` is
            handed a `functools.partial` of that dataclass, to be completed, and a field `named` the options that the
            command line names.
        runner: the module whose `run` takes an instance. It is imported when the command runs: it may be slow.
    """

    def command(context: typer.Context, **values: Any) -> None:
        if "named" in options.__dataclass_fields__:
            values["named"] = _named(context)
        instance = _gather("", options, values)
        slow = not {"model", "program"}.isdisjoint(options.__dataclass_fields__)
        with console.busy("Starting") if slow else nullcontext():
            own = "model_options" in options.__dataclass_fields__  # what it runs is no other program's
            with swift_imports(all_used=not own):
                run = import_module(runner).run
        run(instance)

    flat = [Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context), *_flatten("", options, None)]
    command.__doc__ = options.__doc__
    command.__signature__ = Signature(flat)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return command


def _named(context: typer.Context) -> frozenset[str]:
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return frozenset(name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE")


def _group(hint: Any) -> Any:
    """The dataclass behind a hint; None if there is none."""
    group = get_args(hint)[0] if get_origin(hint) is partial else hint
    return group if is_dataclass(group) else None


def _members(group: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, hint and default of each field."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        yield field.name, hints[field.name], Parameter.empty if field.default is MISSING else field.default


def _flatten(name: str, hint: Any, default: Any) -> Iterator[Parameter]:
    if group := _group(hint):
        for member in _members(group):
            yield from _flatten(*member)
        return
    info = next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, ParameterInfo)), None)
    if info is None and default is not Parameter.empty:
        return  # a field that is no option
    if info is not None and info.parser is not None:  # Typer knows no unions, and parses the default, too
        hint = Annotated[str, info]
        if default is not None or info.show_default:
            default = str(default).lower()
    yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _gather(name: str, hint: Any, values: dict[str, Any]) -> Any:
    if not (group := _group(hint)):
        return values[name]
    made = {
        member: _gather(member, inner, values)
        for member, inner, _ in _members(group)
        if member in values or _group(inner)
    }
    return partial(group, **made) if get_origin(hint) is partial else group(**made)
