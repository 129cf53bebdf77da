"""Commands that take whole groups of flags: what several of them share is written once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import Parameter, Signature, cleandoc, signature
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer import Option

from xdonnx_cli.configuration import CONFIGURED, Origins, configure, weighed
from xdonnx_cli.flags import SWITCH, running
from xdonnx_cli.options import flags_of, named, offered
from xdonnx_cli.output import check_json

_CONFIG = (
    "Flags from this file. Default: the nearest xdonnx.toml or \\[tool.xdonnx] of pyproject.toml. What it turns on is "
    "typed off as --no-force. See xdonnx init."
)


def _help(context: typer.Context, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        typer.echo(context.get_help(), color=context.color)
        raise typer.Exit()


# The one that typer adds by itself has a type in its help, as if it took a value.
HELP = Annotated[
    bool, Option("--help", "-h", metavar=SWITCH, is_eager=True, callback=_help, help="Show this message and exit.")
]
CONFIG = Annotated[
    str | None, running("--config", "FILE|none", _CONFIG, is_eager=True, callback=configure, show_default=False)
]


def grouped(command: Callable[..., int]) -> Callable[..., int]:
    """Return the command as typer reads it: each parameter that is a dataclass becomes that dataclass's fields.

    It gets a --help and, where it can be configured, a --config; a parameter annotated `Origins` is told where each
    value comes from.

    Parameters
    ----------
    command : callable
        The fields of its dataclasses are annotated as typer wants it; those without a default must be given.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    flags: list[Parameter] = []
    told = [name for name, kind in hints.items() if kind == Origins]
    for parameter in signature(command).parameters.values():
        kind = hints[parameter.name]
        if parameter.name in told:
            continue
        if not is_dataclass(kind):
            flags.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=kind))
            continue
        groups[parameter.name] = kind
        inner = get_type_hints(kind, include_extras=True)
        flags += [
            Parameter(f.name, Parameter.KEYWORD_ONLY, default=_default(f), annotation=inner[f.name])
            for f in fields(kind)
        ]
    added: dict[str, Any] = {"config": CONFIG} if command.__name__ in CONFIGURED else {}
    added |= {"help": HELP}
    flags += [
        Parameter(name, Parameter.KEYWORD_ONLY, default=False if name == "help" else None, annotation=kind)
        for name, kind in added.items()
    ]
    given_context = any(kind is typer.Context for kind in hints.values())
    if not given_context:
        flags.insert(0, Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context))

    def flat(**given: Any) -> int:
        context = given["context"] if given_context else given.pop("context")
        plain = {name: value for name, value in given.items() if name not in added}
        off = {name for name, other in opposites.items() if plain.pop(other)}
        plain, origins = weighed(context, known, plain, off)
        if isinstance(plain.get("json"), str):
            check_json(plain["json"], named({name: flag for name, flag in known.items() if name != "json"}, plain))
        made = {name: kind(**{f.name: plain.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        return command(**plain, **made, **dict.fromkeys(told, origins))

    opposites = _opposites(flags) if command.__name__ in CONFIGURED else {}
    flags += [
        Parameter(other, Parameter.KEYWORD_ONLY, default=False, annotation=_hidden(other))
        for other in opposites.values()
    ]
    flat.__name__, flat.__doc__ = command.__name__, unwrapped(command.__doc__ or "")
    flat.__annotations__ = {flag.name: flag.annotation for flag in flags}
    flat.__signature__ = Signature(flags)  # type: ignore[attr-defined]
    known = flags_of(flat)
    for flag in flags:
        if flag.name in known and (words := offered(known[flag.name])) is not None:
            flag.annotation.__metadata__[0].autocompletion = words
    return flat


def _opposites(flags: list[Parameter]) -> dict[str, str]:
    """Return {switch: what turns it off}, since a file may have it on: no_force, and progress for no_progress."""
    switches = [flag.name for flag in flags if get_args(flag.annotation)[:1] == (bool,) and flag.name != "help"]
    return {name: name[3:] if name.startswith("no_") else f"no_{name}" for name in switches}


def _hidden(name: str) -> Any:
    return Annotated[bool, Option(f"--{name.replace('_', '-')}", hidden=True)]


def unwrapped(text: str) -> str:
    """Return a docstring with each paragraph in one line: typer would keep the breaks of the source."""
    return "\n\n".join(" ".join(part.split()) for part in cleandoc(text).split("\n\n"))


def _default(field: Field[Any]) -> Any:
    return Parameter.empty if field.default is MISSING else field.default
