"""What a table is: the TOML file that describes it, checked, and the runs that it asks for."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import xdonnx  # before torch, which its other modules import: see the README's Troubleshooting
from xdonnx.contents import is_number
from xdonnx.errors import JobError, did_you_mean
from xdonnx.methods import available
from xdonnx.report import tool
from xdonnx.sweep.identity import key, placed, sources
from xdonnx.wanted import Job

# What a row, a seed or the script itself says; the rest of a Job may stand in `options`.
TAKEN = frozenset(["model", "out", "shots", "labels", "per_class", "holdout", "preprocess", "gate", "force", "seed"])
OPTIONS = tuple(name for name in Job.model_fields if name not in TAKEN)
# What a row reads, of which the contents make its key.
_FILES = ("model", "shots", "labels", "holdout")

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


class Row(BaseModel):
    """A teacher, its data and its target.

    `per_class` are the numbers of shots per class, one column each; without it all samples fit. `options` are fields
    of `xdonnx.Job`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    model: Name
    shots: Name
    holdout: Name | float
    labels: Name | None = None
    preset: str = "imagenet"
    per_class: tuple[Count, ...] | None = Field(None, min_length=1)
    judge: Literal["accuracy", "agreement"] = "accuracy"
    options: Mapping[str, Any] = {}
    methods: tuple[Name, ...] | None = None

    @property
    def columns(self) -> tuple[int | None, ...]:
        """Shots per class, rising; (None,) where all samples fit."""
        return (None,) if self.per_class is None else tuple(sorted(set(self.per_class)))


class Method(BaseModel):
    """What competes: the name that the table shows, and the fields of `xdonnx.Job` behind it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    options: Mapping[str, Any] = {}
    rows: tuple[Name, ...] | None = None


class Table(BaseModel):
    """Methods by rows by shots per class by seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = ""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2, 3, 4), min_length=1)
    row: tuple[Row, ...] = Field(min_length=1)
    method: tuple[Method, ...] = Field(min_length=1)

    def methods_of(self, row: Row) -> list[Method]:
        """Return the methods that run in a row, in the table's order."""
        return [
            method
            for method in self.method
            if (row.methods is None or method.name in row.methods) and (method.rows is None or row.name in method.rows)
        ]


@dataclass(frozen=True)
class Run:
    """One student: a cell of the table and a seed; `key` is a hash of everything that decides the result."""

    row: str
    method: str
    per_class: int | None
    seed: int
    job: Job
    key: str


def read_table(path: Path) -> Table:
    """Read a TOML file; whether methods and files exist is for `runs` to see.

    Raises
    ------
    JobError
        It is missing, no TOML, or describes no table: what is wrong, where, and what may stand there.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError(f"no table at '{path}': {error.strerror}.\n  Name a TOML file.") from error
    except ValueError as error:
        raise JobError(f"'{path}' is no TOML: {error}.") from error
    try:
        table = Table.model_validate(raw)
    except ValidationError as error:
        raise JobError(f"'{path.name}', {_told(error, raw)}") from error
    names = {"row": [row.name for row in table.row], "method": [method.name for method in table.method]}
    for kind, given in names.items():
        for name in given:
            if given.count(name) > 1:
                raise JobError(f"'{path.name}' has two {kind}s named '{name}'.\n  Give each a name of its own.")
    for row in table.row:
        _check(f"'{path.name}', row '{row.name}'", row.options, "methods", row.methods, names["method"])
    for method in table.method:
        _check(f"'{path.name}', method '{method.name}'", method.options, "rows", method.rows, names["row"])
    return table


def runs(table: Table, path: Path, data: Path | None, *, strict: bool = False) -> list[Run]:
    """Return every run of a table, seeds outermost, so that early results cover the table.

    Parameters
    ----------
    table : Table
    path : Path
        The TOML file. Paths that begin with '.' are relative to its folder, and so are others without `data`.
    data : Path or None
        The folder of models and samples.
    strict : bool
        Whether a change of xdonnx itself makes a run another one.

    Raises
    ------
    JobError
        A file or a method is not there, or an option has a value that it cannot have.
    """
    version = f"{tool().version} {sources()}" if strict else ""
    found = {row.name: _files(row, path, data) for row in table.row}
    listed = []
    for seed in dict.fromkeys(table.seeds):
        for row in table.row:
            for per_class in row.columns:
                for method in table.methods_of(row):
                    where = f"'{path.name}', row '{row.name}', method '{method.name}'"
                    job = _job(row, method, found[row.name], per_class, seed, where)
                    listed.append(Run(row.name, method.name, per_class, seed, job, key(job, version)))
    return listed


def _check(
    where: str, options: Mapping[str, Any], key: str, wanted: Sequence[str] | None, choices: Sequence[str]
) -> None:
    """Raise JobError for an option that a Job does not have, and for a limit to rows or methods that are not there."""
    for name in wanted or ():
        if name not in choices:
            near = did_you_mean(name, choices)
            raise JobError(f"{where}, {key}: there is no '{name}'.{near}\n  Choices: {', '.join(choices)}.")
    for name in options:
        if name not in OPTIONS:
            why = "is said outside of options" if name in TAKEN else "is no field of a Job"
            raise JobError(
                f"{where}, options: '{name}' {why}.{did_you_mean(name, OPTIONS)}\n  Options: {', '.join(OPTIONS)}."
            )


def _told(error: ValidationError, raw: Mapping[str, Any]) -> str:
    """Return where and what the first mistake is, and what to do."""
    first = error.errors()[0]
    places: list[str] = []
    here: Any = raw
    for at, step in enumerate(first["loc"]):
        below = here.get(step) if isinstance(here, dict) else None
        if isinstance(here, list) and isinstance(step, int) and at == 1:
            below = here[step]
            name = below.get("name") if isinstance(below, dict) else None
            places[-1] += f" {step + 1}" + (f" '{name}'" if name else "")
        elif isinstance(step, str) and at < 3:
            places.append(step)
        here = below
    where = ", ".join(places)
    if first["type"] == "extra_forbidden":
        part = str(first["loc"][0]) if len(first["loc"]) > 1 else ""
        keys = list({"row": Row.model_fields, "method": Method.model_fields}.get(part, Table.model_fields))
        return f"{where}: unknown key.{did_you_mean(str(first['loc'][-1]), keys)}\n  Keys: {', '.join(keys)}."
    if first["type"] == "missing":
        return f"{where}: missing.\n  Add it; samples/papers/README.md has an example."
    return f"{where}: {first['msg']}.\n  It says {first['input']!r}."


def _files(row: Row, path: Path, data: Path | None) -> dict[str, Path]:
    """Return the files of a row by the names of their fields, all of them there."""
    found = {}
    for field in _FILES:
        text = getattr(row, field)
        if text is None or is_number(text):
            continue
        home = path.parent if text.startswith(".") or data is None else data
        found[field] = placed(text, home)
        if not found[field].exists():
            raise JobError(
                f"'{path.name}', row '{row.name}', {field}: nothing at '{found[field]}'.\n"
                "  --data DIR or XDONNX_DATA names the folder that paths are relative to; without, it is the TOML's."
            )
    return found


def _job(row: Row, method: Method, files: Mapping[str, Path], per_class: int | None, seed: int, where: str) -> Job:
    """Return the job of a cell; it names OUT, but not yet the folder that OUT will lie in."""
    options = {**row.options, **method.options}
    try:
        job = Job(
            **options,
            model=files["model"],
            out=Path("student.onnx"),
            shots=(str(files["shots"]),),
            holdout=str(files.get("holdout", row.holdout)),
            labels=files.get("labels"),
            per_class=per_class,
            preprocess=xdonnx.Preprocess(row.preset),
            seed=seed,
        )
    except JobError as error:
        raise JobError(f"{where}: {error}") from error
    known = available()
    for name in job.method:
        if name not in known:
            near = did_you_mean(name, known)
            raise JobError(f"{where}: this xdonnx has no method '{name}'.{near}\n  Methods: {', '.join(known)}.")
    return job
