"""One trial: a job run in a folder of its own, and all that is kept of it."""

from __future__ import annotations

import dataclasses
import errno
import json
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import xdonnx
from xdonnx.contents import PATHS, SOURCES, is_number, named
from xdonnx.errors import MachineError, XdonnxError
from xdonnx.gate import Gate
from xdonnx.images import Preprocess
from xdonnx.report import Figures, Report
from xdonnx.sweep.records import Record
from xdonnx.wanted import Job

# What is compared with the teacher, as shares of it.
COSTS = ("macs", "bytes", "nonzero", "latency")


@dataclass(frozen=True)
class Task:
    """A job to be done, wherever that is.

    Parameters
    ----------
    key : str
        What its record is known by.
    job : Job
        Its paths are those of the machine that asks. OUT is where the student will lie in the end, and what the report
        says; whoever does the job writes elsewhere.
    threads : int or None
        Of torch. Sums are split between threads, so another number of them gives other last digits. None: as they are.
    student : bool
        Whether the student's files come back with the report.
    """

    key: str
    job: Job
    threads: int | None = None
    student: bool = False


@dataclass(frozen=True)
class Done:
    """What came of a task: the line for runs.jsonl, and files by their names."""

    key: str
    record: Record
    files: Mapping[str, bytes] = field(default_factory=dict)


# Does tasks and yields what comes of each as soon as it is there; the second argument is told of a task that begins.
Perform = Callable[[Sequence[Task], Callable[[Task], None]], Iterator[Done]]


def measure(task: Task, scratch: Path | None = None, moved: Mapping[Path, Path] | None = None) -> Done:
    """Make one student in a temporary folder and return what it is worth.

    What stops a job is its result too: `error` says it. `final` is whether trying again would give the same.

    Parameters
    ----------
    task : Task
    scratch : Path, optional
        Where the temporary folder is made.
    moved : mapping, optional
        Where files of the job lie on this machine; reports and errors name them as the job does.
    """
    started, moved = time.perf_counter(), moved or {}
    line: Record = {"key": task.key, "status": "failed", "exit_code": 1, "error": "", "final": True}
    line["command"] = command(task.job)
    with _threads(task.threads), tempfile.TemporaryDirectory(dir=scratch, prefix="trial-") as place:
        out = Path(place) / task.job.out.name
        names = {str(there): str(here) for here, there in moved.items()} | {place: str(task.job.out.parent)}
        try:
            job = relocated(task.job, moved).model_copy(update={"out": out})
            report = xdonnx.run(job, command=line["command"])
        except XdonnxError as error:
            final = not isinstance(error, MachineError)
            failed = {"error": renamed(str(error), names), "exit_code": error.exit_code, "final": final}
            return Done(task.key, line | failed)
        except Exception as error:  # one trial of many: the others are still worth having
            code = MachineError.exit_code if _scarce(error) else 1
            text = renamed(f"internal: {type(error).__name__}: {error}", names)
            return Done(task.key, line | {"error": text, "exit_code": code, "final": False})
        files = _files(report, names, student=task.student)
    return Done(task.key, line | worth(report) | {"seconds": round(time.perf_counter() - started, 3)}, files)


def failure(task: Task, text: str) -> Done:
    """Return what is recorded of a task whose worker was lost; it is tried again when the sweep is."""
    line = {"key": task.key, "status": "failed", "exit_code": MachineError.exit_code, "error": text, "final": False}
    return Done(task.key, line | {"command": command(task.job)})


def worth(report: Report) -> Record:
    """Return the figures of a report as a flat record: costs as shares of the teacher's, fidelity in per cent."""
    fidelity, figures = report.fidelity, {"teacher": _costs(report.teacher), "student": _costs(report.student)}
    pairs = {name: (figures["student"][name], figures["teacher"][name]) for name in COSTS}
    shares = {name: mine / whole if whole and mine is not None else None for name, (mine, whole) in pairs.items()}
    errors = [output.relative_l2 for output in fidelity.outputs if output.relative_l2 is not None] if fidelity else []
    student = report.files.student
    return {
        "status": report.status,
        "exit_code": report.exit_code,
        "reasons": list(report.reasons),
        **shares,
        "accuracy": fidelity and fidelity.accuracy_student,
        "agreement": fidelity and fidelity.top1_agreement,
        "relative_l2": max(errors, default=None),
        "teacher": fidelity and fidelity.accuracy_teacher,
        "drop": fidelity and fidelity.drop and fidelity.drop.value,
        "judged": fidelity and fidelity.samples,
        "fitted": report.fit_samples,
        "figures": figures,
        "student": student and {"name": Path(student.path).name, "sha256": student.sha256, "bytes": student.bytes},
        "device": report.device,
        "version": report.tool.version,
        "started": report.started,
    }


def command(job: Job) -> str:
    """Return the command line that makes the same student."""
    words = ["xdonnx", "compress", str(job.model)]
    for name in Job.model_fields:
        value = getattr(job, name)
        if name in ("model", "out") or name not in job.model_fields_set or value is None or value is False:
            continue
        if isinstance(value, (Preprocess, Gate)):
            words += _flags(value)
        elif name == "input_shape":
            words += [w for at, shape in value.items() for w in ("--input-shape", f"{at}:{'x'.join(map(str, shape))}")]
        elif value is True:
            words.append(_flag(name))
        else:
            words += [word for each in (value if isinstance(value, tuple) else [value]) for word in _words(name, each)]
    return shlex.join([*words, "-o", "student.onnx"])


def relocated(job: Job, moved: Mapping[Path, Path]) -> Job:
    """Return a job whose files lie elsewhere; those that are not named stay where they are."""
    if not moved:
        return job
    changes: dict[str, Any] = {name: moved[here] for name in PATHS if (here := getattr(job, name)) in moved}
    for source in SOURCES:
        found = [(name, moved.get(path, path)) for name, path in map(named, getattr(job, source))]
        changes[source] = tuple(f"{name}={path}" if name else str(path) for name, path in found)
    if not is_number(job.holdout):
        changes["holdout"] = str(moved.get(Path(job.holdout), job.holdout))
    return job.model_copy(update=changes)


def renamed(text: str, names: Mapping[str, str]) -> str:
    """Return a text with paths replaced, the longest first: one may be the beginning of another."""
    for found in sorted(names, key=len, reverse=True):
        text = text.replace(found, names[found])
    return text


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _scarce(error: Exception) -> bool:
    """Whether it was the machine that ended a job: no memory, no space."""
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return full or isinstance(error, MemoryError) or "out of memory" in str(error).lower()


def _files(report: Report, names: Mapping[str, str], *, student: bool) -> dict[str, bytes]:
    # As JSON writes them, a path may hold what has to be escaped.
    escaped = {_escaped(found): _escaped(told) for found, told in names.items()}
    found = {"report.json": (renamed(report.model_dump_json(indent=2), escaped) + "\n").encode("utf-8", "replace")}
    if student and report.files.student:
        file = Path(report.files.student.path)
        # Weights that do not fit into the file lie beside it.
        found |= {path.name: path.read_bytes() for path in (file, file.with_name(f"{file.name}.data")) if path.exists()}
    return found


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _costs(figures: Figures | None) -> dict[str, Any]:
    if figures is None:
        return dict.fromkeys(COSTS)
    latency = figures.latency_ms.median if figures.latency_ms else None
    return {name: getattr(figures, name) for name in COSTS[:-1]} | {"latency": latency}


def _flags(options: Preprocess | Gate) -> list[str]:
    """Return the flags of options that are not at their defaults, and the preset in any case."""
    words: list[str] = []
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        if option.name != "preset" and (value == option.default or isinstance(value, bool)):
            continue
        if option.name == "warn_only":
            words += [word for name in value for word in ("--warn-only", name.replace("_", "-"))]
        else:
            words += _words(option.name, ",".join(map(str, value)) if isinstance(value, tuple) else value)
    return words


def _words(name: str, value: object) -> list[str]:
    return [_flag(name), str(value)]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
