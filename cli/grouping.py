"""Commands that take whole groups of flags: what several of them share is written once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import Parameter, Signature, cleandoc, signature
from typing import Any, get_type_hints


def grouped(command: Callable[..., int]) -> Callable[..., int]:
    """Return the command as typer reads it: each parameter that is a dataclass becomes that dataclass's fields.

    Parameters
    ----------
    command : callable
        The fields of its dataclasses are annotated as typer wants it; those without a default must be given.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    flags: list[Parameter] = []
    for parameter in signature(command).parameters.values():
        kind = hints[parameter.name]
        if not is_dataclass(kind):
            flags.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=kind))
            continue
        groups[parameter.name] = kind
        inner = get_type_hints(kind, include_extras=True)
        flags += [
            Parameter(f.name, Parameter.KEYWORD_ONLY, default=_default(f), annotation=inner[f.name])
            for f in fields(kind)
        ]

    def flat(**given: Any) -> int:
        made = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        return command(**given, **made)

    flat.__name__, flat.__doc__ = command.__name__, unwrapped(command.__doc__ or "")
    flat.__annotations__ = {flag.name: flag.annotation for flag in flags}
    flat.__signature__ = Signature(flags)  # type: ignore[attr-defined]
    return flat


def unwrapped(text: str) -> str:
    """Return a docstring with each paragraph in one line: typer would keep the breaks of the source."""
    return "\n\n".join(" ".join(part.split()) for part in cleandoc(text).split("\n\n"))


def _default(field: Field[Any]) -> Any:
    return Parameter.empty if field.default is MISSING else field.default
