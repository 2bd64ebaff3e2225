"""The signature that Typer reads of a command, made from dataclasses of options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import partial, wraps
from inspect import Parameter, Signature
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer.models import ParameterInfo


def from_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a parameter or a field that is a dataclass stand for its options, the fields annotated with Typer's.

    A field `partial[Settings]` is handed a `functools.partial` of the dataclass, for the command to complete.
    """
    hints = get_type_hints(command, include_extras=True)
    hints.pop("return")

    @wraps(command)
    def grouped(**values: Any) -> None:
        command(**{name: _gather(name, hint, values) for name, hint in hints.items()})

    flat = [option for name, hint in hints.items() for option in _flatten(name, hint, Parameter.empty)]
    grouped.__signature__ = Signature(flat)  # type: ignore[attr-defined]
    grouped.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return grouped


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
