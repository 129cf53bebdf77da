"""Flags from `xdonnx.toml`, from `[tool.xdonnx]` in `pyproject.toml` and from `XDONNX_*`.

What is typed comes first, then the environment, then the file, then the default. A file looks like this:

    shots = "photos"          # for every command that has --shots
    macs = "40%"
    [gate]
    max-drop = 1              # a limit, wherever limits are judged
    [compress]
    out = "student.onnx"      # for compress alone, and before what stands above

Values go as text through the parsers of the flags, so that a file can say no more and no less than a command line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from xdonnx.errors import JobError, did_you_mean
from xdonnx_cli.options import Flag
from xdonnx_cli.precedence import void
from xdonnx_cli.searching import PROJECT, chosen, table_of, text_of
from xdonnx_cli.terminal import say, stderr

PREFIX = "XDONNX_"
# A key of several commands is of the kind that the first of these has: --json of inspect is another, a switch.
CONFIGURED = ("compress", "plan", "match", "verify", "gate", "inspect", "bench")
# Meant something else by each command, so it stands in a command's own table.
OWN = ("out", "report_dir", "student")
# Of ours, but no options: the folder of real models that tests run on, and the one that says which file.
_OTHERS = ("XDONNX_DATA", "XDONNX_CONFIG", "XDONNX_CACHE")
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")

Value = str | list[str] | bool


@dataclass(frozen=True)
class Origin:
    """Where a value comes from.

    Parameters
    ----------
    source : {'command line', 'environment', 'file', 'default'}
    name : str
        The variable, or the key with its table.
    path : Path, optional
    line : int, optional
        Counted from 1; None where the key could not be found again in the text.
    """

    source: str
    name: str = ""
    path: Path | None = None
    line: int | None = None

    def __str__(self) -> str:
        """Say it in a few words."""
        if self.path is not None:
            return f"{self.path}{'' if self.line is None else f', line {self.line}'}"
        return self.name or self.source

    def to_dict(self) -> dict[str, Any]:
        """Return it for --json, without what it does not have."""
        found = {"source": self.source, "name": self.name, "path": self.path and str(self.path), "line": self.line}
        return {key: value for key, value in found.items() if value not in (None, "")}


Origins = Mapping[str, Origin]


@dataclass(frozen=True)
class Setting:
    """A value that was not typed, as text, and where it comes from."""

    flag: Flag
    value: Value
    origin: Origin


@dataclass(frozen=True)
class Settings:
    """What one run of the program knows of its flags; it learns which were set as it goes.

    Parameters
    ----------
    known : mapping
        The flags of each command.
    used : dict
        Those of its own command that a file or a variable sets.
    commands : list of typer.Context
        That command, once there is one.
    """

    known: Mapping[str, Mapping[str, Flag]]
    used: dict[str, Setting] = field(default_factory=dict)
    commands: list[typer.Context] = field(default_factory=list)

    def source(self, name: str) -> str:
        """Return where typer has a value from, as it calls it; nothing before it has one."""
        sources = [command.get_parameter_source(name) for command in self.commands]
        return sources[0].name if sources and sources[0] is not None else ""

    @property
    def verbose(self) -> bool:
        """Whether more is to be said, where that was not typed."""
        return "verbose" in self.used and self.used["verbose"].value is True


def configure(context: typer.Context, given: str | None) -> None:
    """Give the command its values from environment and file; called before any other flag is looked at."""
    settings = context.find_object(Settings)
    if settings is None or context.resilient_parsing:
        return
    command = str(context.info_name)
    variables = from_environment(settings, command)
    path = chosen(given or os.environ.get("XDONNX_CONFIG") or None)
    written = from_file(path, settings.known, command) if path else {}
    settings.used.update(_replaced(written, variables) | variables)
    settings.commands.append(context)
    context.default_map = {name: setting.value for name, setting in settings.used.items()}


def weighed(
    context: typer.Context, flags: Mapping[str, Flag], given: dict[str, Any], off: Set[str] = frozenset()
) -> tuple[dict[str, Any], Origins]:
    """Return the values of a command with what was typed replacing its alternatives, and where each comes from.

    Parameters
    ----------
    context : typer.Context
    flags : mapping
        Of the command.
    given : dict
        {flag: value}, as typer has it.
    off : set of str
        Switches that were typed off.
    """
    given = {**given, **dict.fromkeys(off, False)}
    settings = context.find_object(Settings)
    if settings is None or not settings.commands:
        return given, {}
    used, typed = settings.used, dict[str, Any]()
    origins = dict.fromkeys(flags, Origin("default"))
    for name, flag in flags.items():
        source = settings.source(name)
        if name in off:
            used.pop(name, None)
        if source == "COMMANDLINE" or name in off:
            origins[name] = Origin("command line", flag.shown)
            typed[name] = given[name]
        elif source == "DEFAULT_MAP":
            origins[name] = used[name].origin
    for name in void({name: setting.value for name, setting in used.items()}, typed, flags):
        given[name] = flags[name].default
        origins[name] = Origin("default")
        used.pop(name)
    return given, origins


def explained(text: str, settings: Settings) -> str:
    """Return an error with a line for each value in it that was not typed: whoever reads it has not seen that value."""
    lines = []
    for name, setting in settings.used.items():
        if settings.source(name) != "DEFAULT_MAP":
            continue
        flag, value = setting.flag, setting.value
        words = [re.escape(flag.shown)] + [flag.name] * ("_" in flag.name)
        quoted = value if isinstance(value, list) else [] if isinstance(value, bool) else [value]
        named = re.search(rf"(?<![\w-])({'|'.join(words)})(?![\w-])", text)
        if named or any(f"'{part}'" in text for part in quoted):
            what = "variable" if setting.origin.source == "environment" else "file"
            lines.append(f"\n  {flag.shown} is not typed but set, by the {what}: {setting.origin}.")
    return text + "".join(lines)


def _replaced(lower: Mapping[str, Setting], higher: Mapping[str, Setting]) -> dict[str, Setting]:
    flags = {name: setting.flag for name, setting in {**lower, **higher}.items()}
    low, high = ({name: setting.value for name, setting in place.items()} for place in (lower, higher))
    gone = void(low, high, flags)
    return {name: setting for name, setting in lower.items() if name not in gone}


def shared(known: Mapping[str, Mapping[str, Flag]]) -> dict[str, Flag]:
    """Return every flag by name, as the first command that has it knows it."""
    found: dict[str, Flag] = {}
    for command in CONFIGURED:
        for name, flag in known.get(command, {}).items():
            found.setdefault(name, flag)
    return found


# The environment


def from_environment(settings: Settings, command: str) -> dict[str, Setting]:
    """Return what XDONNX_* says to a command; raises JobError for a name that is nearly one of ours."""
    every = shared(settings.known)
    found = {}
    for variable, text in sorted(os.environ.items()):
        if not variable.startswith(PREFIX) or variable in _OTHERS or not text.strip():
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in every:
            near = get_close_matches(name, every, n=1, cutoff=0.75)
            if near:
                raise JobError(f"unknown variable {variable}. Did you mean {PREFIX}{near[0].upper()}?\n  Or unset it.")
            # Others set such names too: a Kubernetes service called xdonnx makes XDONNX_SERVICE_HOST.
            say(stderr(), f"warning: {variable} is no option of xdonnx, and does nothing.", "yellow")
        elif (flag := _taker(settings.known, command, every[name])) is not None:
            found[name] = Setting(flag, _of_text(flag, text, variable), Origin("environment", variable))
    return found


def _taker(known: Mapping[str, Mapping[str, Flag]], command: str, flag: Flag) -> Flag | None:
    """Return the flag of that name and kind which a command has."""
    own = known.get(command, {}).get(flag.name)
    return own if own is not None and own.kind == flag.kind else None


def _of_text(flag: Flag, text: str, variable: str) -> Value:
    if flag.kind == "list":
        return [part.strip() for part in text.split(",") if part.strip()]
    if flag.kind == "value":
        return text
    if text.strip().lower() not in (*_YES, *_NO):
        raise JobError(f"{variable} is '{text}', and {flag.shown} is a switch.\n  Write 1 or 0.")
    return text.strip().lower() in _YES


# The file


def from_file(path: Path, known: Mapping[str, Mapping[str, Flag]], command: str) -> dict[str, Setting]:
    """Return what a file says to a command.

    Every key of the file is checked, also those for other commands.

    Raises
    ------
    JobError
        The file is not TOML, a key is unknown, a value is of the wrong type.
    """
    table = table_of(path)
    if table is None:
        raise JobError(f"'{path}' has no table [tool.xdonnx].\n  Add it, or name another file.")
    lines = _lines(path)
    levels: dict[str, dict[str, Setting]] = {"": {}, "gate": {}, command: {}}
    for place, key, value in _entries(table, known):
        name, origin = key.replace("-", "_"), _origin(path, lines, place, key)
        flag, takers = _known(place, name, known, origin, table=isinstance(value, dict))
        for taker in takers:
            text = _of_toml(known[taker][flag.name], value, origin, path.parent)
            if taker == command:
                into = levels["gate" if place == "gate" and command != "gate" else place]
                if name in into:
                    raise JobError(f"{origin}: '{key}' is given twice, with - and with _.\n  Leave one out.")
                into[name] = Setting(known[taker][name], text, origin)
    general = _replaced(levels[""], levels[command])
    return general | levels["gate"] | levels[command]


def _entries(table: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield (table, key, value) for each; the table of what stands on top is ''."""
    for key, value in table.items():
        if isinstance(value, dict) and key in known:
            for inner, what in value.items():
                yield key, inner, what
        else:
            yield "", key, value


def _known(
    place: str, name: str, known: Mapping[str, Mapping[str, Flag]], origin: Origin, *, table: bool
) -> tuple[Flag, tuple[str, ...]]:
    """Return the flag of a key and the commands that take it; raises JobError where there are none."""
    every, key = shared(known), name.replace("_", "-")
    if place == "" and name in every:
        if name in OWN:
            raise JobError(
                f"{origin}: '{key}' means other files for other commands.\n"
                "  Put it in the table of one: under [compress], for instance."
            )
        return every[name], tuple(c for c in known if _taker(known, c, every[name]) is not None)
    own = known[place] if place else every
    if name not in own:
        near = did_you_mean(key, known if table and not place else [flag.key for flag in own.values()])
        hint = "Keys are the names of flags. All of them, with their meaning: xdonnx init."
        if place and name in every:
            hint = f"xdonnx {place} has no {every[name].shown}. Above all tables it is for every command that has it."
        raise JobError(f"{origin}: unknown key '{key}'{f' in [{place}]' if place else ''}.{near}\n  {hint}")
    if place == "gate" and own[name].is_limit:
        return own[name], tuple(c for c in known if name in known[c])
    return own[name], (place,)


def _of_toml(flag: Flag, value: Any, origin: Origin, base: Path) -> Value:
    """Return a TOML value as the text that a flag takes; raises JobError for one of the wrong type."""
    if flag.kind == "switch":
        if not isinstance(value, bool):
            raise JobError(f"{origin}: {flag.key} is {_said(value)}, and a switch.\n  Write true or false.")
        return value
    if flag.kind == "list":
        if isinstance(value, dict) and flag.name in ("shots", "pool", "input_shape"):
            return [_pair(flag, name, what, origin, base) for name, what in value.items()]
        return [_one(flag, part, origin, base) for part in (value if isinstance(value, list) else [value])]
    if isinstance(value, list) and "," in flag.metavar:
        return ",".join(_one(flag, part, origin, base) for part in value)
    return _one(flag, value, origin, base)


def _one(flag: Flag, value: Any, origin: Origin, base: Path) -> str:
    wants = wanted(flag)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (number and wants == "text") or not (number or (isinstance(value, str) and wants not in _NUMBERS)):
        raise JobError(
            f"{origin}: {flag.key} is {_said(value)}, and wants {wants}.\n  For example: {flag.key} = {flag.example}"
        )
    if isinstance(value, float) and flag.type is int:
        raise JobError(f"{origin}: {flag.key} is {value}, and wants a whole number.")
    return placed(flag, value, base) if isinstance(value, str) else str(value)


_NUMBERS = ("a number", "a whole number")


def wanted(flag: Flag) -> str:
    """Return what a flag takes, in words."""
    if flag.kind == "switch":
        return "true or false"
    if flag.type in (int, float) and not flag.parsed:
        return "a whole number" if flag.type is int else "a number"
    if flag.parsed or "," in flag.metavar or (flag.type is str and flag.is_path and flag.beside_path - {"-"}):
        return "a number or text"
    return "text"


def _pair(flag: Flag, name: str, value: Any, origin: Origin, base: Path) -> str:
    """Return one entry of a table: NAME=PATH of samples, NAME:SIZES of shapes."""
    if flag.name in ("shots", "pool"):
        return f"{name}={_one(flag, value, origin, base)}"
    if isinstance(value, list) and all(isinstance(size, int) for size in value):
        value = "x".join(map(str, value))
    return f"{name}:{_one(flag, value, origin, base)}"


def placed(flag: Flag, text: str, base: Path) -> str:
    """Return a path as it is from here, where it stands in a file as it is from there; other text as it is."""
    if not flag.is_path or text == "-":
        return text
    if flag.beside_path - {"-"} and _number(text):
        return text
    if flag.kind == "list" and "=" in text and not (base / text).exists():
        name, _, path = text.partition("=")
        return f"{name}={placed(flag, path, base)}"
    path = os.path.expanduser(text)
    return path if base.resolve() == Path.cwd() else str(base / path)


def _number(text: str) -> bool:
    try:
        float(text.strip().removesuffix("%"))
    except ValueError:
        return False
    return True


def _said(value: Any) -> str:
    """Return a value of a file as it would be written there, as far as that matters."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return "a table" if isinstance(value, dict) else "a list" if isinstance(value, list) else str(value)


def _origin(path: Path, lines: Mapping[tuple[str, ...], int], place: str, key: str) -> Origin:
    """Return where a key of a table stands."""
    whole = (place, key) if place else (key,)
    return Origin("file", ".".join(whole), path, lines.get(whole, lines.get(whole[:1])))


def _lines(path: Path) -> dict[tuple[str, ...], int]:
    """Find the lines of our keys again, which the parser of TOML does not tell; those of our tables too."""
    above = ("tool", "xdonnx") if path.name == PROJECT else ()
    table: tuple[str, ...] = ()
    found: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(text_of(path).splitlines(), 1):
        if header := re.match(r"\s*\[+([^\[\]]+)\]", line):
            whole = table = _parts(header[1])
        elif key := re.match(r"\s*([\w\s.\"'-]+?)\s*=", line):
            whole = (*table, *_parts(key[1]))
        else:
            continue
        if whole[: len(above)] == above:
            for end in range(len(above) + 1, len(whole) + 1):
                found.setdefault(whole[len(above) : end], number)
    return found


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in text.split("."))
