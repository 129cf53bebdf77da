"""Flags of `xdonnx compress` as they stand in a table of TOML, checked and made into a `Job`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from xdonnx.contents import PATHS, SOURCES, is_number
from xdonnx.errors import JobError, did_you_mean
from xdonnx.gate import Gate
from xdonnx.images import Preprocess
from xdonnx.methods import available
from xdonnx.sweep.identity import placed
from xdonnx.wanted import Job

PIXELS = tuple(field.name for field in dataclasses.fields(Preprocess))
LIMITS = tuple(field.name for field in dataclasses.fields(Gate) if field.name != "strict")
# What the sweep itself says, and where.
ELSEWHERE = {
    "model": "in [[model]]",
    "seed": "by seeds = [0, 1]",
    "out": "by the sweep: every trial has a folder of its own",
    "force": "by the sweep: it never replaces what it has",
    "gate": "by its limits: max-drop = 1",
    "preprocess": "by its parts: preset = 'unit'",
}
OPTIONS = (*(name for name in Job.model_fields if name not in ELSEWHERE), *PIXELS, *LIMITS)
# Of these a job has one.
TARGETS = tuple(
    name for name in ("macs", "params", "size", "latency", "keep", "plan", "smallest") if name in Job.model_fields
)
_HINTS: dict[str, Any] = {
    **{name: field.annotation for name, field in Job.model_fields.items()},
    **get_type_hints(Preprocess),
    **get_type_hints(Gate),
}
# What may be given as 50%; of these a point is not a hundredth.
_SHARES = ("macs", "params", "size", "latency", "keep", "min_shrink", "confidence", "holdout", "max_drop")


def checked(given: Mapping[str, Any], where: str, home: Path, keys: tuple[str, ...] = OPTIONS) -> dict[str, Any]:
    """Return options under the names that a job has for them, with values that it takes.

    Parameters
    ----------
    given : mapping
        As they stand in the file: names with - or _, per cent as text, paths relative to the file.
    where : str
        The place in the file, for messages.
    home : Path
        The folder of the file.
    keys : tuple of str
        What may stand there.

    Raises
    ------
    JobError
        A key that is none, or a value of the wrong kind, or a file that is not there.
    """
    found: dict[str, Any] = {}
    for said, value in given.items():
        name = said.replace("-", "_")
        if name in found:
            raise JobError(f"{where}: '{said}' is given twice, with - and with _.\n  Leave one out.")
        if name not in keys:
            raise JobError(f"{where}: {_unknown(said, name, keys)}")
        found[name] = _plain(name, value, f"{where}, {said}", home)
    job_of(found, model=home / "model.onnx", where=where)
    return {name: value for name, value in found.items() if value is not None}


def _unknown(said: str, name: str, keys: tuple[str, ...]) -> str:
    if name in ELSEWHERE:
        return f"'{said}' is said {ELSEWHERE[name]}.\n  Leave it out here."
    shown = [key.replace("_", "-") for key in keys]
    what = "does not stand here" if name in OPTIONS else "unknown key"
    near = did_you_mean(name.replace("_", "-"), shown)
    return f"{what}: '{said}'.{near}\n  Keys are the flags of xdonnx compress: {', '.join(sorted(shown))}."


def job_of(options: Mapping[str, Any], *, model: Path, where: str, seed: int = 0) -> Job:
    """Return the job of flat options; raises JobError, with the place, for a value that is none for its field."""
    parts = {
        "preprocess": {name: value for name, value in options.items() if name in PIXELS},
        "gate": {name: value for name, value in options.items() if name in LIMITS},
    }
    given = {name: value for name, value in options.items() if name not in PIXELS and name not in LIMITS}
    given |= {name: part for name, part in parts.items() if part}
    try:
        job = Job(model=model, out=Path("student.onnx"), seed=seed, **given)
    except JobError as error:
        raise JobError(f"{where}: {error}") from error
    known = available()
    for name in job.method:
        if name not in known:
            near = did_you_mean(name, known)
            raise JobError(f"{where}: there is no method '{name}'.{near}\n  Methods: {', '.join(known)}.")
    return job


def is_whole(name: str) -> bool:
    """Return whether an option counts something; raises JobError for one that is no number."""
    kinds = _HINTS[name], *get_args(_HINTS[name])
    if int not in kinds and float not in kinds:
        raise JobError(f"'{name.replace('_', '-')}' has no range.\n  List its choices: [...]")
    return float not in kinds


def label(options: Mapping[str, Any]) -> str:
    """Return a few words for options: 'macs 50%, residual'."""
    words = []
    for name, value in options.items():
        key = name.replace("_", "-")
        if value is True:
            words.append(key)
        elif name in ("macs", "params", "size", "latency", "keep") and isinstance(value, float):
            words.append(f"{key} {100 * value:g}%")
        else:
            words.append(f"{key} {told(value)}")
    return ", ".join(words)


def told(value: Any) -> str:
    """Return a value in a few letters."""
    if isinstance(value, (tuple, list)):
        return "+".join(map(told, value))
    return value.name if isinstance(value, Path) else f"{value:g}" if isinstance(value, float) else str(value)


def _plain(name: str, value: Any, where: str, home: Path) -> Any:
    """Return a value as a job takes it."""
    if name in (*PATHS, *SOURCES) or (name == "holdout" and not _is_share(value)):
        return _there(name, value, where, home)
    if name in _SHARES and isinstance(value, str) and value.strip().endswith("%"):
        value = _share(value, where, 1 if name == "max_drop" else 100)
    if name == "holdout":
        return f"{value:g}" if isinstance(value, float) else str(value)
    if name == "round_to" and value == "auto":
        return None
    if name == "warn_only":
        names = [value] if isinstance(value, str) else value
        return tuple(str(each).replace("-", "_") for each in names)
    return tuple(value) if isinstance(value, list) else value


def _is_share(value: Any) -> bool:
    return not isinstance(value, str) or is_number(value.strip().removesuffix("%"))


def _share(text: str, where: str, whole: int) -> float:
    try:
        return float(text.strip().removesuffix("%")) / whole
    except ValueError:
        raise JobError(f"{where}: '{text}' is no number.\n  Write 50% as text, or 0.5.") from None


def _there(name: str, value: Any, where: str, home: Path) -> Any:
    """Return paths that stand in the file as they are from anywhere, all of them there."""
    if name in SOURCES and isinstance(value, dict):
        return tuple(f"{at}={_there('', path, where, home)}" for at, path in value.items())
    if name in SOURCES and isinstance(value, list):
        return tuple(each for part in value for each in _there(name, part, where, home))
    if not isinstance(value, str) or not value:
        raise JobError(f"{where}: {value!r} is no path.\n  Write text, relative to the folder of the file.")
    port, equals, path = value.partition("=")
    if name in SOURCES and equals and not placed(value, home).exists():
        return (f"{port}={_there('', path, where, home)}",)
    found = placed(value, home)
    if not found.exists():
        raise JobError(f"{where}: nothing at '{found}'.\n  Paths are relative to the folder of the file, '{home}'.")
    return (str(found),) if name in SOURCES else str(found) if name == "holdout" else found
