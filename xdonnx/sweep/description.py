"""What a sweep is: the TOML file that describes it, read and checked.

title = "Digits"
seeds = [0, 1, 2]
targets = [{ macs = "50%" }, { macs = "25%" }]

[options]                 # flags of xdonnx compress, for all trials
shots = "shots"
preset = "unit"

[[model]]
model = "digits_vgg.onnx"

[[method]]
name = "cross"

[[method]]
name = "smallest filters"
method = "l1-norm"
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xdonnx.draw import LARGEST_SEED
from xdonnx.errors import JobError, did_you_mean
from xdonnx.methods import available
from xdonnx.sweep.identity import placed
from xdonnx.sweep.options import OPTIONS, TARGETS, checked, is_whole, label

Cost = Literal["macs", "bytes", "weights", "latency"]
Quality = Literal["accuracy", "agreement", "error"]
Backend = Literal["serial", "processes", "ray"]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


class Range(BaseModel):
    """Numbers that a search may take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: float
    high: float
    step: float | None = Field(None, gt=0)
    log: bool = False


class Search(BaseModel):
    """How Optuna looks for trials.

    Parameters
    ----------
    trials : int
        Points for each model; a point is as many jobs as there are seeds.
    sampler : {'tpe', 'nsga2'}
    seed : int
        Of the sampler.
    batch : int
        Points that are chosen together, knowing nothing of each other. It, and not the number of workers, decides what
        the search finds.
    population : int
        Of nsga2.
    space : mapping
        Options, each a range or a list of choices.
    """

    model_config = _STRICT

    trials: Count = 32
    sampler: Literal["tpe", "nsga2"] = "tpe"
    seed: Annotated[int, Field(ge=0)] = 0
    batch: Count = 4
    population: Annotated[int, Field(ge=2)] = 16
    space: Mapping[str, Any] = {}


class Running(BaseModel):
    """Where trials are done, and with how much.

    Parameters
    ----------
    backend : {'serial', 'processes', 'ray'}
    jobs : int, optional
        Trials at a time.
    cpus : int
        Cores, and threads of torch, for each trial: the same on every backend, so that students are the same too.
    gpus : float, optional
        What Ray keeps free for each trial; a part of one is a GPU that is shared. Default: 1 where device is cuda.
    address : str, optional
        Of a Ray cluster: 'auto' or HOST:PORT. None starts one on this machine.
    students : {'all', 'best', 'none'}
        Which files are kept; 'best' are those that no other beats.
    """

    model_config = _STRICT

    backend: Backend = "serial"
    jobs: Count | None = None
    cpus: Count = 1
    gpus: Annotated[float, Field(ge=0)] | None = None
    address: Text | None = None
    students: Literal["all", "best", "none"] = "all"


class _Sheet(BaseModel):
    """The file as it is written; what stands in tables of options is checked afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = ""
    seeds: tuple[Annotated[int, Field(ge=0, le=LARGEST_SEED, strict=True)], ...] = Field((0,), min_length=1)
    cost: Cost = "macs"
    quality: Quality | None = None
    structures: tuple[Text, ...] = ()
    targets: tuple[Mapping[str, Any], ...] = ()
    options: Mapping[str, Any] = {}
    model: tuple[Mapping[str, Any], ...] = Field(min_length=1)
    method: tuple[Mapping[str, Any], ...] = ()
    search: Search | None = None
    run: Running = Running()


@dataclass(frozen=True)
class Choice:
    """Options under a name."""

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Teacher:
    """A model, and the options of the trials on it."""

    name: str
    model: Path
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Description:
    """A sweep.

    Parameters
    ----------
    path : Path
        The file.
    title, seeds, cost, quality, search, run
        As they stand in it; quality None is accuracy where samples are labelled, else agreement.
    models : tuple of Teacher
        With the options of all trials merged in.
    axes : mapping
        What is varied: {'method': its choices, 'structure': ..., 'target': ...}; only those that the file names.
    space : mapping
        What a search varies besides: ranges, and tuples of choices.
    """

    path: Path
    title: str
    seeds: tuple[int, ...]
    cost: Cost
    quality: Quality | None
    models: tuple[Teacher, ...]
    axes: Mapping[str, tuple[Choice, ...]]
    space: Mapping[str, Range | tuple[Choice, ...]]
    search: Search | None
    run: Running


def read_sweep(path: Path) -> Description:
    """Read a sweep.

    Raises
    ------
    JobError
        It is missing, no TOML, or describes no sweep: what is wrong, where, and what may stand there.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        raw = tomllib.loads(text)
    except OSError as error:
        raise JobError(f"no sweep at '{path}': {error.strerror}.\n  Name a TOML file; the README has one.") from error
    except ValueError as error:
        raise JobError(f"'{path}' is no TOML: {error}.\n  Text is quoted there: macs = \"50%\".") from error
    try:
        sheet = _Sheet.model_validate(raw)
    except ValidationError as error:
        raise JobError(_told(error, raw, path.name, text)) from error
    return _described(path, sheet, text)


def _described(path: Path, sheet: _Sheet, text: str) -> Description:
    home = path.parent.absolute()

    def options(given: Mapping[str, Any], place: str, **more: Any) -> dict[str, Any]:
        try:
            return checked(given, f"'{path.name}', {place}", home, **more)
        except JobError as error:
            key = next((key for key in given if f"'{key}'" in str(error) or f", {key}:" in str(error)), "")
            raise JobError(_lined(str(error), path.name, text, key)) from error

    shared = options(sheet.options, "[options]")
    models = []
    for at, given in enumerate(sheet.model, start=1):
        place = f"[[model]] {at}"
        given = dict(given)
        model = _model(given, f"'{path.name}', {place}", home)
        name = _name(given, model.stem, f"'{path.name}', {place}")
        models.append(Teacher(name, model, shared | options(given, f"{place} '{name}'")))
    axes: dict[str, tuple[Choice, ...]] = {}
    if sheet.method:
        axes["method"] = tuple(_method(dict(given), at, path.name, options) for at, given in enumerate(sheet.method, 1))
    if sheet.structures:
        found = [options({"structure": name}, "structures") for name in sheet.structures]
        axes["structure"] = tuple(Choice(each["structure"], each) for each in found)
    if sheet.targets:
        found = [options(given, f"targets {at}", keys=TARGETS) for at, given in enumerate(sheet.targets, start=1)]
        axes["target"] = tuple(Choice(label(each), each) for each in found)
    every: dict[str, Sequence[Teacher | Choice]] = {"model": models, **axes}
    for kind, named in every.items():
        names = [each.name for each in named]
        for name in names:
            if names.count(name) > 1:
                raise JobError(f"'{path.name}' has two {kind}s named '{name}'.\n  Give each a name of its own.")
    space = _space(sheet.search, axes, f"'{path.name}', [search.space]", home) if sheet.search else {}
    _check_overlap(path.name, models, axes, space)
    return Description(
        path=path,
        title=sheet.title or path.stem,
        seeds=tuple(dict.fromkeys(sheet.seeds)),
        cost=sheet.cost,
        quality=sheet.quality,
        models=tuple(models),
        axes=axes,
        space=space,
        search=sheet.search,
        run=sheet.run,
    )


def _model(given: dict[str, Any], where: str, home: Path) -> Path:
    """Take the path of a model out of its table."""
    said = given.pop("model", None)
    if not isinstance(said, str) or not said:
        raise JobError(f'{where}: no model.\n  Name an ONNX file: model = "teacher.onnx"')
    found = placed(said, home)
    if not found.is_file():
        raise JobError(f"{where}: no model at '{found}'.\n  Paths are relative to the folder of the file, '{home}'.")
    return found


def _name(given: dict[str, Any], otherwise: str, where: str) -> str:
    """Take a name out of a table."""
    name = given.pop("name", otherwise)
    if not isinstance(name, str) or not name.strip():
        raise JobError(f"{where}: name is {name!r}.\n  It takes text.")
    return name


def _method(given: dict[str, Any], at: int, file: str, options: Any) -> Choice:
    """Return a named set of options; a name that is a method's means that method, unless another is said."""
    said = given.get("method")
    if said is None and "name" not in given:
        raise JobError(f"'{file}', [[method]] {at}: no name.\n  Give it one: name = \"cross\"")
    otherwise = label({"method": said}).removeprefix("method ") if said else ""
    name = _name(given, otherwise, f"'{file}', [[method]] {at}")
    if "method" not in given and name in available():
        given["method"] = name
    elif not given:
        near = did_you_mean(name, available())
        raise JobError(
            f"'{file}', [[method]] {at}: '{name}' is no method, and nothing else is said.{near}\n"
            f'  Say what it is: method = "cross". Methods: {", ".join(available())}.'
        )
    return Choice(name, options(given, f"[[method]] '{name}'"))


def _space(
    search: Search, axes: Mapping[str, Sequence[Choice]], where: str, home: Path
) -> dict[str, Range | tuple[Choice, ...]]:
    """Return what a search varies besides methods, structures and targets."""
    found: dict[str, Range | tuple[Choice, ...]] = {}
    for said, value in search.space.items():
        name = said.replace("-", "_")
        if isinstance(value, list):
            each = [checked({said: one}, f"{where}, {said}", home) for one in value]
            named = tuple(Choice(label(one).removeprefix(f"{name.replace('_', '-')} "), one) for one in each)
            if not named or len({choice.name for choice in named}) < len(named):
                raise JobError(f"{where}: '{said}' has no choices, or two that are the same.\n  Name each once.")
            found[name] = named
            continue
        if not isinstance(value, dict):
            raise JobError(f"{where}: {said} is {value!r}.\n  Write {{ low = 0.1, high = 0.9 }}, or a list of choices.")
        found[name] = _range(said, value, where, home)
    if not found and not any(len(choices) > 1 for choices in axes.values()):
        raise JobError(f"{where}: nothing to search.\n  Give a range, such as macs = {{ low = 0.2, high = 0.8 }}")
    return found


def _range(said: str, given: Mapping[str, Any], where: str, home: Path) -> Range:
    ends = {side: checked({said: given[side]}, f"{where}, {said}", home) for side in ("low", "high") if side in given}
    plain = {side: next(iter(end.values()), None) for side, end in ends.items()}
    try:
        made = Range.model_validate({**given, **plain})
    except ValidationError as error:
        first = error.errors()[0]
        keys = ", ".join(Range.model_fields)
        place = ".".join(map(str, first["loc"]))
        raise JobError(f"{where}, {said}: {place}: {first['msg']}.\n  A range has {keys}.") from error
    try:
        whole = is_whole(said.replace("-", "_"))
    except JobError as error:
        raise JobError(f"{where}: {error}") from error
    if whole and any(number % 1 for number in (made.low, made.high, made.step or 1)):
        raise JobError(f"{where}, {said}: it counts, and the range is of fractions.\n  Give whole numbers.")
    if made.low >= made.high or (made.log and (made.low <= 0 or made.step)):
        raise JobError(
            f"{where}, {said}: {made.low:g} to {made.high:g} is no range.\n"
            "  low has to be below high and, with log, above zero; log takes no step."
        )
    return made


def _check_overlap(
    file: str, models: Sequence[Teacher], axes: Mapping[str, Sequence[Choice]], space: Mapping[str, Any]
) -> None:
    """Raise JobError where two parts say the same, one of which would have no effect."""
    places: list[tuple[str, set[str]]] = [
        ("[options] or [[model]]", {name for model in models for name in model.options}),
        *((_TITLES[axis], {name for choice in its for name in choice.options}) for axis, its in axes.items()),
        ("[search.space]", set(space)),
    ]
    for (sooner, theirs), (later, mine) in combinations(places, 2):
        if (sooner, later) == (places[0][0], _TITLES["method"]):
            continue  # what all trials share, a method may refine
        if both := sorted(mine & theirs):
            key = both[0].replace("_", "-")
            raise JobError(f"'{file}': '{key}' is said by {sooner} and by {later}.\n  Leave one of them out.")
        one, other = (sorted(names & set(TARGETS)) for names in (theirs, mine))
        if one and other:
            said = f"'{one[0]}' by {sooner} and '{other[0]}' by {later}"
            raise JobError(f"'{file}' gives two targets: {said}.\n  Leave one of them out.")


_TITLES = {"method": "[[method]]", "structure": "structures", "target": "targets"}


def _told(error: ValidationError, raw: Mapping[str, Any], file: str, text: str) -> str:
    """Return where and what the first mistake of the file is, and what to do."""
    # A key that is misspelt is missed too; the one that is there tells more.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    steps = [str(step) for step in first["loc"]]
    key = next((step for step in reversed(steps) if not step.isdecimal()), "")
    where = f"'{file}', {', '.join(steps)}"
    if first["type"] == "extra_forbidden":
        tables: dict[str, type[BaseModel]] = {"search": Search, "run": Running}
        part = tables.get(steps[0], _Sheet) if len(steps) > 1 else _Sheet
        near = did_you_mean(key, list(part.model_fields))
        hint = f"Keys: {', '.join(part.model_fields)}."
        if part is _Sheet and key.replace("-", "_") in OPTIONS:
            hint = f"It is a flag of xdonnx compress: put it into [options]. {hint}"
        return _lined(f"{where}: unknown key.{near}\n  {hint}", file, text, key)
    if first["type"] == "missing":
        return f"{where}: missing.\n  Add it; the README has an example."
    said = first["input"]
    if first["type"] == "tuple_type":
        how = f"[[{key}]], with two brackets" if isinstance(said, dict) else f"{key} = [...]"
        return _lined(f"{where}: it takes a list.\n  Write {how}.", file, text, key)
    return _lined(f"{where}: {first['msg']}.\n  It says {said!r}.", file, text, key)


def _lined(message: str, file: str, text: str, key: str) -> str:
    """Return a message with the line of a key, where only one line has it."""
    pattern = rf"(?:^|[{{,])\s*[\"']?{re.escape(key)}[\"']?\s*="
    found = [number for number, line in enumerate(text.splitlines(), start=1) if key and re.search(pattern, line)]
    return message.replace(f"'{file}'", f"'{file}', line {found[0]}", 1) if len(found) == 1 else message
