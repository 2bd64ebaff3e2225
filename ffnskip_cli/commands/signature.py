"""The signature that Typer reads of a command, made from dataclasses of options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import partial, wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer.models import OptionInfo


def from_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a parameter that is a dataclass stand for its options, which are the fields annotated with a `typer.Option`.

    A parameter `partial[Settings]` is handed a `functools.partial` of the dataclass, for the command to complete.
    """
    flat: list[Parameter] = []
    groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in signature(command).parameters.items():
        is_partial = get_origin(hints[name]) is partial
        group: Any = get_args(hints[name])[0] if is_partial else hints[name]
        make: Callable[..., Any] = partial(partial, group) if is_partial else group
        if is_dataclass(group):
            options = list(_options(group))
            flat += options
            groups[name] = (make, [option.name for option in options])
        else:
            flat.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @wraps(command)
    def grouped(**values: Any) -> None:
        for name, (make, names) in groups.items():
            values[name] = make(**{option: values.pop(option) for option in names})
        command(**values)

    grouped.__signature__ = Signature(flat)  # type: ignore[attr-defined]
    grouped.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return grouped


def _options(group: Any) -> Iterator[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        hint = hints[field.name]
        info = next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, OptionInfo)), None)
        if info is None:
            continue
        default = Parameter.empty if field.default is MISSING else field.default
        if info.parser is not None:  # Typer knows no unions, and parses the default, too
            hint = Annotated[str, info]
            if default is not None or info.show_default:
                default = str(default).lower()
        yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)
