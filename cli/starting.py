"""`xdonnx init` and `xdonnx schema`: a file of settings to start from, and what files and reports may hold.

Both are made from the flags themselves, and so know what these know.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xdonnx.errors import JobError, MachineError
from xdonnx.files import put
from xdonnx_cli.configuration import CONFIGURED, OWN, Settings, shared, wanted
from xdonnx_cli.flags import SWITCH, output, running
from xdonnx_cli.options import Flag
from xdonnx_cli.searching import FILE
from xdonnx_cli.terminal import beside, say, stdout

if TYPE_CHECKING:
    from xdonnx.model import Port

_HEAD = f"""\
# Settings of xdonnx. What is typed comes first, then XDONNX_* variables, then this file, then the defaults.
# Keys are the names of flags; take away the # before a key to set it. Values are examples where they are not marked
# as the default. A list of one may stand without brackets.
# Paths are relative to this file, which xdonnx finds from its folder and all below. In pyproject.toml the same
# keys stand in [tool.xdonnx]. As variables: XDONNX_MACS=40%, XDONNX_METHOD=cross,tune (lists by commas),
# XDONNX_FORCE=1. To see what is set by what: xdonnx compress --dry-run. To leave {FILE} out: --config none.

# For every command that has the flag.
"""
_TABLES = {
    "gate": "Limits, wherever they are judged: by compress, verify and gate. What is no limit is for gate alone.",
    "compress": "For compress alone, before what stands above. Any flag of compress may stand here.",
    "plan": "For plan alone.",
    "match": "For match alone.",
    "verify": "For verify alone.",
}
_WIDTH = 110


def init(
    context: typer.Context,
    place: Annotated[Path | None, typer.Argument(metavar="DIR", help="Where to. Default: here.")] = None,
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", readable=False, help="An ONNX file to write it for.")
    ] = None,
    force: Annotated[bool, output("--force", SWITCH, "Replace a file that exists.")] = False,
    verbose: Annotated[bool, running("--verbose", SWITCH, "Tracebacks.", "-v")] = False,
) -> int:
    """Write xdonnx.toml, with every setting, its meaning and its default, all commented out.

    With a MODEL, what can be read from it is set.
    """
    del verbose  # read where errors are reported
    settings = context.find_object(Settings)
    assert settings is not None, "the program always has them"
    folder, model = _places([path for path in (place, model) if path is not None])
    path = folder / FILE
    if path.exists() and not force:
        raise JobError(f"'{path}' exists.\n  Pass --force to replace it.")
    text = template(settings.known, _of_model(model, folder) if model else {})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        put(path, text)
    except OSError as error:
        raise MachineError(f"cannot write '{path}': {error.strerror}.") from error
    say(stdout(), f"Wrote {beside(path)}. Edit it, then: xdonnx compress --dry-run")
    return 0


def schema(
    context: typer.Context,
    config: Annotated[bool, output("--config", SWITCH, "That of xdonnx.toml instead.")] = False,
) -> int:
    """Print the JSON Schema of report.json, or of xdonnx.toml."""
    if config:
        settings = context.find_object(Settings)
        assert settings is not None, "the program always has them"
        found = config_schema(settings.known)
    else:
        from xdonnx.report import schema as report_schema

        found = report_schema()
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    return 0


def _places(given: list[Path]) -> tuple[Path, Path | None]:
    """Return folder and model: a file is a model, whichever place it stands in."""
    models = [path for path in given if path.is_file() or path.suffix == ".onnx"]
    folders = [path for path in given if path not in models]
    if len(models) > 1 or len(folders) > 1:
        raise JobError(f"init takes one folder and one model, not {' and '.join(map(str, given))}.")
    return (folders or [Path()])[0], models[0] if models else None


def _of_model(path: Path, folder: Path) -> dict[str, str]:
    """Return {key: value} of what a model itself says, as a file has it; 'table.key' for what stands in a table."""
    from xdonnx.model import interface, read_proto

    found = interface(read_proto(path))
    sides = {port.name: _shape(port) for port in found.inputs if _shape(port)}
    here = os.path.relpath(path, folder)
    answers = [port for port in found.outputs if len(port.shape or ()) == 2]
    limit = {"gate.max-drop": "1.0"} if answers else {"gate.max-error": "0.1"}
    shapes = ", ".join(f"{json.dumps(name)} = {list(shape)}" for name, shape in sides.items())
    return {
        "model": json.dumps(here, ensure_ascii=False),
        **({"input-shape": f"{{ {shapes} }}"} if sides else {}),
        **limit,
        "gate.min-shrink": '"10%"',
        "compress.out": json.dumps(f"{Path(here).stem}.small.onnx", ensure_ascii=False),
    }


def _shape(port: Port) -> tuple[int, ...]:
    """Return a shape for an image input whose height or width the graph leaves free; nothing for others."""
    shape = tuple(port.shape or ())
    if len(shape) != 4 or all(isinstance(size, int) for size in shape[1:]):
        return ()
    last = isinstance(shape[3], int) and shape[3] in (1, 3)
    sizes = [size if isinstance(size, int) else 224 for size in shape]
    channels = 3 if last else 1
    if not isinstance(shape[channels], int):
        sizes[channels] = 3
    return (1, *sizes[1:])


def template(known: Mapping[str, Mapping[str, Flag]], values: Mapping[str, str]) -> str:
    """Return xdonnx.toml with every key: commented out with its default or an example, or set to a value given.

    Parameters
    ----------
    known : mapping
        The flags of each command.
    values : mapping
        {key, or table.key: value as TOML}.
    """
    lines = [_HEAD.rstrip()]
    panel = None
    for flag in _panels(shared(known)):
        if flag.panel != panel:
            panel = flag.panel
            lines += ["", f"# -- {panel or 'Files'} --"]
        lines += _entry(flag, values.get(flag.key))
    for table, text in _TABLES.items():
        lines += ["", f"[{table}]", f"# {text}"]
        for flag in _of_table(table, known):
            lines += _entry(flag, values.get(f"{table}.{flag.key}"))
    return "\n".join(lines) + "\n"


def _panels(flags: Mapping[str, Flag]) -> list[Flag]:
    """Return the flags for the top of a file, those of one panel together."""
    order = list(dict.fromkeys(flag.panel for flag in flags.values()))
    top = [flag for flag in flags.values() if not flag.is_limit and not _own(flag)]
    return sorted(top, key=lambda flag: order.index(flag.panel))


def _of_table(table: str, known: Mapping[str, Mapping[str, Flag]]) -> Iterator[Flag]:
    for flag in known[table].values():
        if _own(flag) or (flag.is_limit and table == "gate"):
            yield flag


def _own(flag: Flag) -> bool:
    """Whether a flag stands in the table of its command: --plan because a file cannot hold a key and a table [plan]."""
    return flag.name in OWN or flag.name in _TABLES


def _entry(flag: Flag, value: str | None) -> list[str]:
    """Return the lines of one key: what it means, and the key."""
    about = [f"# {line}" for line in textwrap.wrap(flag.help, _WIDTH)]
    if value:
        return [*about, f"{flag.key} = {value}"]
    example = '"plan.toml"' if flag.name == "out" and "plan" in flag.help else flag.example
    default = "  # the default" if flag.default is not None else ""
    return [*about, f"#{flag.key} = {example}{default}"]


def config_schema(known: Mapping[str, Mapping[str, Flag]]) -> dict[str, Any]:
    """Return the JSON Schema of xdonnx.toml, for editors that check it while it is written."""
    every = shared(known)
    tables = {
        name: {
            "type": "object",
            "additionalProperties": False,
            "properties": _properties(known[name]),
        }
        for name in CONFIGURED
        if name in known
    }
    top = _properties({name: flag for name, flag in every.items() if name not in OWN})
    both = {name: {"anyOf": [top[name], table]} if name in top else table for name, table in tables.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": FILE,
        "type": "object",
        "additionalProperties": False,
        "properties": top | both,
    }


def _properties(flags: Mapping[str, Flag]) -> dict[str, Any]:
    """Return each key of a table, in both its spellings."""
    found: dict[str, Any] = {}
    for flag in flags.values():
        about = _type(flag) | {"description": flag.help}
        if flag.default is not None:
            about["default"] = str(flag.default) if isinstance(flag.default, Path) else flag.default
        found |= {flag.key: about, flag.name: about}
    return found


def _type(flag: Flag) -> dict[str, Any]:
    names = {"true or false": "boolean", "a whole number": "integer", "a number": "number", "text": "string"}
    kind = names.get(wanted(flag))
    one: dict[str, Any] = {"type": kind} if kind else {"type": ["number", "string"]}
    if flag.kind == "list":
        return {"anyOf": [one, {"type": "array", "items": one}, *([{"type": "object"}] * _paired(flag))]}
    if "," in flag.metavar:
        return {"anyOf": [one, {"type": "array", "items": one}]}
    return one | ({"enum": list(flag.choices)} if flag.choices and flag.name != "device" else {})


def _paired(flag: Flag) -> bool:
    return flag.name in ("shots", "pool", "input_shape")
