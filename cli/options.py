"""What a flag is, read from the function that takes it: the one truth of files, variables, templates and schemas."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from typer.models import ArgumentInfo, OptionInfo

from xdonnx_cli.flags import limit, target

# Metavars of what lies on disk; a flag that is typed as text may take one of them besides something else.
_PATHS = {"PATH", "FILE", "DIR", "OUT"}
# The titles of two panels, as their makers have them.
_LIMITS, _TARGETS = (make("", "", "").rich_help_panel for make in (limit, target))
# Help such as 'auto, pgd or greedy. ...' begins with all that the flag takes.
_LISTED = re.compile(r"((?:[\w:-]+, )+)([\w:-]+) or ([\w:-]+)[.:]")
_STRUCTURES = ("channel", "element", "2:4")
# Examples of what has no default, as a file of TOML has them: by name, else by metavar, else by type.
_EXAMPLES = {
    "method": '["cross", "tune"]', "warn_only": '["max-latency-ratio"]', "structure": '"channel"', "color": '"rgb"',
    "std": "[0.229, 0.224, 0.225]", "max_error": "0.1", "max_latency_ratio": "1.0", "confidence": '"95%"',
    "model": '"model.onnx"', "teacher": '"model.onnx"', "student": '"student.onnx"', "report": '"student.report"',
    "out": '"student.onnx"', "json": '"-"', "plan": '"plan.toml"', "match": '"match.toml"', "labels": '"labels.txt"',
    "min_shrink": '"10%"', "scale": "255.0", "shots": '"photos"', "report_dir": '"report"',
    "PATH": '"photos"', "FILE": '"file.txt"', "DIR": '"folder"', "K": "5", "N": "100", "F|PATH": "0.2", "P": '"50%"',
    "A,B,C": "[0.485, 0.456, 0.406]", "X": "0.5", "PX": "256", "F": "0.5", "POINTS": "1.0", "PATTERN": '["stage3*"]',
    "NAME:1x3x224x224": "{ image = [1, 3, 224, 224] }", "N|auto": "8", "10MB|P": '"10MB"', "5ms|P": '"70%"',
}  # fmt: skip


@dataclass(frozen=True)
class Flag:
    """One option or argument of a command.

    Parameters
    ----------
    name : str
        As a parameter of the function: 'max_drop'.
    shown : str
        As it is typed: '--max-drop', or 'MODEL' for an argument.
    kind : {'switch', 'list', 'value'}
    type : type
        Of one value: bool, int, float, str or Path.
    parsed : bool
        Whether a parser of its own reads it, so that text may stand for a number: '50%'.
    metavar, help, panel : str
    default : object
        None where there is none.
    """

    name: str
    shown: str
    kind: str
    type: type
    parsed: bool
    metavar: str
    help: str
    panel: str
    default: Any

    @property
    def key(self) -> str:
        """Its name in a file."""
        return self.name.replace("_", "-")

    @property
    def beside_path(self) -> frozenset[str]:
        """The metavars that it has beside that of a path; empty where a path is all it takes."""
        return frozenset(self.metavar.split("|")) - _PATHS

    @property
    def is_path(self) -> bool:
        """Whether it takes the name of a file or folder, perhaps among other things."""
        return self.type is Path or bool(_PATHS & set(self.metavar.split("|")))

    @property
    def choices(self) -> tuple[str, ...]:
        """Return all that it takes, where its help begins with that; nothing where it takes more."""
        listed = _LISTED.match(self.help)
        return (*listed[1].removesuffix(", ").split(", "), listed[2], listed[3]) if listed else ()

    @property
    def example(self) -> str:
        """Return a value as a file has it: the default, else one that makes sense."""
        if self.kind == "switch":
            return "true" if self.default else "false"
        if self.default is not None:
            return f'"{self.default}"' if isinstance(self.default, (str, Path)) else str(self.default)
        kinds = {int: "8", float: "0.5"}
        return _EXAMPLES.get(self.name) or _EXAMPLES.get(self.metavar) or kinds.get(self.type, '"text"')

    @property
    def is_limit(self) -> bool:
        """Whether it is a limit of the gate."""
        return self.panel == _LIMITS

    @property
    def is_target(self) -> bool:
        """Whether it says how much goes, of which there can be but one."""
        return self.panel == _TARGETS and self.name != "allocation"


def flags_of(command: Callable[..., int]) -> Mapping[str, Flag]:
    """Return the options and arguments of a command by name, but for hidden ones and those that only ask something."""
    found = {}
    for parameter in signature(command).parameters.values():
        flag = _flag(parameter)
        if flag is not None:
            found[flag.name] = flag
    return found


def _flag(parameter: Parameter) -> Flag | None:
    if get_origin(parameter.annotation) is not Annotated:
        return None
    kind, info = get_args(parameter.annotation)[:2]
    if not isinstance(info, (OptionInfo, ArgumentInfo)) or info.is_eager or info.hidden:
        return None
    inner, many = _one(kind)
    metavar = info.metavar or ""
    # Inside Annotated typer takes the first name for a default until it reads the function itself.
    names = [name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]
    shown = next((name for name in names if name.startswith("--")), metavar or parameter.name)
    return Flag(
        name=parameter.name,
        shown=shown,
        kind="switch" if inner is bool else "list" if many else "value",
        type=inner,
        parsed=info.parser is not None,
        metavar=metavar,
        help=info.help or "",
        panel=str(info.rich_help_panel or ""),
        default=None if parameter.default is Parameter.empty else parameter.default,
    )


def _one(kind: Any) -> tuple[type, bool]:
    """Return the type of one value, and whether there may be several."""
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) in (list, tuple):
        return get_args(kind)[0], True
    return kind, False


def named(flags: Mapping[str, Flag], given: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the paths that were given, by the flag as it is typed."""
    found: dict[str, list[str]] = {}
    for name, flag in flags.items():
        value = given.get(name)
        if flag.is_path and value is not None:
            texts = [str(part) for part in (value if isinstance(value, (list, tuple)) else [value])]
            # An input's name may stand before the path.
            found[flag.shown] = texts + [text.partition("=")[2] for text in texts if "=" in text]
    return found


def offered(flag: Flag) -> Callable[[str], list[str]] | None:
    """Return what gives a shell the words to offer after Tab; None where it offers files, or nothing."""
    if not (flag.choices or flag.name in ("preset", "method", "structure", "warn_only")):
        return None

    def words(incomplete: str) -> list[str]:
        return [word for word in _words(flag) if word.startswith(incomplete)]

    return words


def _words(flag: Flag) -> tuple[str, ...]:
    if flag.name == "preset":
        from xdonnx.images import PRESETS

        return tuple(PRESETS)
    if flag.name == "method":
        from xdonnx.methods import available

        return tuple(available())
    if flag.name == "warn_only":
        from xdonnx.gate import GATES
        from xdonnx.limits import STRICT

        return tuple(name.replace("_", "-") for name in (*GATES, *STRICT))
    return flag.choices or _STRUCTURES
