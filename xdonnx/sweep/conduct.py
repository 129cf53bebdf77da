"""A sweep from beginning to end: what is not done yet is done, kept at once, and shown."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from xdonnx.errors import JobError, MachineError
from xdonnx.events import Event, Log, ignore
from xdonnx.files import put
from xdonnx.model import file_bytes, fingerprint
from xdonnx.report import FileInfo, tool
from xdonnx.sweep.description import Description, Running, Teacher
from xdonnx.sweep.front import Point, known_quality, points
from xdonnx.sweep.local import processes, serial
from xdonnx.sweep.measuring import Done, Perform, Task
from xdonnx.sweep.page import page
from xdonnx.sweep.records import Record, add_record, read_records
from xdonnx.sweep.results import (
    SweepResults,
    TeacherResult,
    as_csv,
    as_markdown,
    exit_code,
    point_result,
    trial_result,
)
from xdonnx.sweep.trials import Trial, grid

INTERRUPTED = 130
RECORDS, SCRATCH = "runs.jsonl", ".scratch"
# The truth first: should one of the others fail, it is there.
FORMS: Mapping[str, Callable[[SweepResults], str]] = {
    "sweep.json": lambda results: results.model_dump_json(indent=2) + "\n",
    "sweep.csv": as_csv,
    "sweep.md": as_markdown,
    "report.html": page,
}


def run_sweep(
    sweep: Description,
    out: str | Path,
    *,
    run: Running | None = None,
    log: Log = ignore,
    command: str = "",
) -> SweepResults:
    """Do what a sweep asks for and is not done yet, and write what was found.

    Parameters
    ----------
    sweep : Description
        From :func:`xdonnx.sweep.description.read_sweep`.
    out : path
        The folder of the sweep. What it holds of this sweep is taken over.
    run : Running, optional
        In place of the sweep's own.
    log : callable
        Told of every trial as it begins, in the stage 'begin', and as it ends, in the stage 'trial'.
    command : str
        What the user typed, for the report.

    Returns
    -------
    SweepResults
        Also in `out`, as sweep.json, sweep.csv, sweep.md and report.html. Exit code 130: interrupted, and the same call
        does the rest.

    Raises
    ------
    XdonnxError
        The sweep cannot begin, or cannot go on; what was done is kept.
    """
    run, out, started = run or sweep.run, Path(out), datetime.now().astimezone()
    _check(run)
    listed: list[Trial] = [] if sweep.search else grid(sweep, out)
    expected = sweep.search.trials * len(sweep.models) * len(sweep.seeds) if sweep.search else len(listed)
    state = _State(out, log, students=run.students, threads=run.cpus, expected=expected)
    interrupted = False
    with _held(out):
        state.records.update(read_records(out / RECORDS))
        try:
            with _backend(run, sweep, out / SCRATCH) as perform:
                _take_all(sweep, listed, state, perform)
                if run.students == "best":
                    _take_lost(sweep, listed, state, perform)
        except KeyboardInterrupt:
            interrupted = True
        results = _results(sweep, run, listed, state, interrupted=interrupted).model_copy(
            update={
                "started": started.isoformat(timespec="seconds"),
                "seconds": round((datetime.now().astimezone() - started).total_seconds(), 3),
                "command": command,
                "warnings": tuple(_warnings(sweep, run)),
            }
        )
        if run.students == "best" and not interrupted:
            _keep_best(out, results)
        write(results, out)
    return results


def _take_all(sweep: Description, listed: list[Trial], state: _State, perform: Perform) -> None:
    """Take the trials of a grid, or of a search, which are listed as they are chosen."""
    if sweep.search is None:
        state.take(listed, perform)
        return
    from xdonnx.sweep.search import explore

    def do(trials: Sequence[Trial]) -> None:
        listed.extend(trials)
        state.take(trials, perform)

    explore(sweep, state.out, state.records, do)


def _take_lost(sweep: Description, listed: Sequence[Trial], state: _State, perform: Perform) -> None:
    """Make the best students again that are gone: they were beaten, or not wanted, when they were made."""
    while True:
        best = [trial for point in _found(sweep, listed, state)[1] if point.optimal for trial in point.trials]
        again = [trial for trial in best if trial.key not in state.taken and is_lost(trial, state.records, state.out)]
        if not again:
            return
        state.do(again, perform)


def write(results: SweepResults, out: Path) -> list[Path]:
    """Write the results in every form; raises MachineError where the folder cannot be written."""
    try:
        return [put(out / name, draw(results)) for name, draw in FORMS.items()]
    except OSError as error:
        raise MachineError(f"cannot write the results to '{out}': {error}.\n  The trials are safe.") from error


def state_of(trial: Trial, records: Mapping[str, Record], out: Path | None = None) -> str:
    """Return 'done', 'todo', 'again', or 'refused'.

    'again' are those that the machine failed and, where the folder is given in which every student is wanted, those
    whose student is gone.
    """
    if trial.refused:
        return "refused"
    if trial.key not in records:
        return "todo"
    lost = out is not None and is_lost(trial, records, out)
    return "done" if records[trial.key]["final"] and not lost else "again"


def is_lost(trial: Trial, records: Mapping[str, Record], out: Path) -> bool:
    """Whether a trial gave a student that is not there: it was not wanted then, or somebody deleted it."""
    student: Record | None = records.get(trial.key, {}).get("student")
    return student is not None and not (out / "trials" / trial.folder / student["name"]).exists()


def cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@dataclass(frozen=True)
class _State:
    """What a running sweep knows and keeps: records by their keys, trials by theirs, and the keys that it has done."""

    out: Path
    log: Log
    students: str
    threads: int
    expected: int
    records: dict[str, Record] = field(default_factory=dict)
    seen: dict[str, Trial] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)

    def take(self, trials: Sequence[Trial], perform: Perform) -> None:
        """Do the trials that are not done yet, or whose students are wanted and gone."""
        self.seen.update({trial.key: trial for trial in trials})
        out = self.out if self.students == "all" else None
        self.do([trial for trial in trials if state_of(trial, self.records, out) in ("todo", "again")], perform)

    def do(self, trials: Sequence[Trial], perform: Perform) -> None:
        """Do trials; each is kept as soon as it is done."""
        waiting = {trial.key: Task(trial.key, trial.job, self.threads, self.students != "none") for trial in trials}
        if not waiting:
            return
        for done in perform(list(waiting.values()), self._begins):
            self._keep(done)
            self.taken.append(done.key)
            self.log(Event("trial", f"{self.seen[done.key]}: {outcome(done.record)}", self.done, self.expected))

    @property
    def done(self) -> int:
        """How many of the trials seen so far have an end."""
        return sum(trial.refused != "" or key in self.records for key, trial in self.seen.items())

    def _begins(self, task: Task) -> None:
        self.log(Event("begin", str(self.seen[task.key]), self.done, self.expected))

    def _keep(self, done: Done) -> None:
        """Put a trial's files into its folder, then its line into runs.jsonl: who finds the line finds the files."""
        trial = self.seen[done.key]
        names = {"model": trial.model, "choices": dict(trial.choices), "seed": trial.seed}
        try:
            if done.files:
                draft, place = self.out / SCRATCH / f"keep-{trial.folder}", self.out / "trials" / trial.folder
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
                for name, content in done.files.items():
                    (draft / name).write_bytes(content)
                shutil.rmtree(place, ignore_errors=True)
                place.parent.mkdir(exist_ok=True)
                draft.replace(place)
            record = {"key": done.key, **names, **done.record}
            add_record(self.out / RECORDS, record)
        except OSError as error:
            raise MachineError(
                f"cannot keep a trial in '{self.out}': {error}.\n"
                "  Free space; the same command goes on where this one stopped."
            ) from error
        self.records[done.key] = record


def outcome(record: Record) -> str:
    """Return what came of a trial in a few words."""
    if record["status"] == "failed":
        return " ".join(f"failed: {record['error']}".split())
    words = [f"{100 * record['macs']:.1f} % of the MACs"] if record["macs"] is not None else []
    for name in ("accuracy", "agreement"):
        if record[name] is not None:
            words.append(f"{name} {record[name]:.2f} %")
            break
    return f"{record['status']}, {', '.join(words)}"


def _warnings(sweep: Description, run: Running) -> Iterator[str]:
    if run.backend != "serial" and sweep.cost == "latency":
        yield "latency was measured while other trials ran beside: it is larger and less sure than of one alone"


def _check(run: Running) -> None:
    """Raise JobError for settings of another backend."""
    if run.backend != "ray" and run.address:
        raise JobError(f"an address is of a Ray cluster, and the backend is {run.backend}.\n  Pass --backend ray.")
    if run.backend == "serial" and (run.jobs or 1) > 1:
        raise JobError(f"{run.jobs} jobs, and the backend serial does one at a time.\n  Pass --backend processes.")


def _backend(run: Running, sweep: Description, scratch: Path) -> AbstractContextManager[Perform]:
    """Return what does the trials."""
    if run.backend == "serial":
        return serial(scratch)
    if run.backend == "processes":
        return processes(scratch, run.jobs or max(1, cores() // run.cpus), run.cpus)
    from xdonnx.sweep.cluster import cluster

    every = [teacher.options for teacher in sweep.models]
    every += [choice.options for choices in sweep.axes.values() for choice in choices]
    on_gpu = any(str(options.get("device", "")).startswith("cuda") for options in every)
    return cluster(run.jobs, run.cpus, float(on_gpu) if run.gpus is None else run.gpus, run.address)


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Hold the folder of a sweep against others, with an empty place for temporary files in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("a")
    except OSError as error:
        raise MachineError(f"cannot write to '{out}': {error.strerror}.\n  Name another folder: -o DIR") from error
    with lock, contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):  # Windows has no such locks
            import fcntl

            try:
                # The system lets go of it however the process ends.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise MachineError(
                    f"another sweep is running in '{out}'.\n  Wait for it, or name another folder: -o DIR"
                ) from error
        scratch = out / SCRATCH
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        yield


def _results(
    sweep: Description, run: Running, listed: Sequence[Trial], state: _State, *, interrupted: bool
) -> SweepResults:
    trials, its_points, quality = _found(sweep, listed, state)
    records = {trial.key: state.records[trial.key] for trial in trials if trial.key in state.records}
    found = [trial_result(trial, records.get(trial.key)) for trial in trials]
    waiting = interrupted or any(trial.status == "waiting" for trial in found)
    status: Literal["complete", "interrupted"] = "interrupted" if waiting else "complete"
    return SweepResults(
        title=sweep.title,
        status=status,
        exit_code=INTERRUPTED if waiting else exit_code(found, records),
        started="",
        seconds=0.0,
        taken=len(state.taken),
        tool=tool(),
        command="",
        file=FileInfo(path=str(sweep.path), sha256=fingerprint(sweep.path), bytes=sweep.path.stat().st_size),
        backend=run.backend,
        cost=sweep.cost,
        quality=quality,  # type: ignore[arg-type]
        seeds=sweep.seeds,
        search=sweep.search.model_dump(mode="json") if sweep.search else None,
        models=tuple(
            _teacher(teacher, [records[t.key] for t in trials if t.model == teacher.name and t.key in records])
            for teacher in sweep.models
        ),
        points=tuple(point_result(point) for point in its_points),
        trials=tuple(found),
    )


def _found(sweep: Description, listed: Sequence[Trial], state: _State) -> tuple[list[Trial], list[Point], str]:
    """Return the trials, each once, their points, and what students are judged by."""
    trials = list({(trial.point, trial.seed): trial for trial in listed}.values())
    records = {trial.key: state.records[trial.key] for trial in trials if trial.key in state.records}
    quality = sweep.quality or known_quality(list(records.values()))
    return trials, points(trials, records, sweep.cost, quality), quality


def _teacher(teacher: Teacher, records: Sequence[Record]) -> TeacherResult:
    known: Record = next((record for record in records if record.get("figures")), {})
    figures = known["figures"]["teacher"] if known else {}
    path = teacher.model
    return TeacherResult(
        name=teacher.name,
        file=FileInfo(path=str(path), sha256=fingerprint(path), bytes=file_bytes(path)),
        macs=figures.get("macs"),
        bytes=figures.get("bytes"),
        weights=figures.get("nonzero"),
        latency_ms=figures.get("latency"),
        accuracy=known.get("teacher"),
    )


def _keep_best(out: Path, results: SweepResults) -> None:
    """Delete the students that another one beats; their reports stay."""
    best = {key for point in results.points if point.optimal for key in point.trials}
    for trial in results.trials:
        if trial.key not in best:
            for file in (out / trial.folder).glob("student*.onnx*"):
                file.unlink(missing_ok=True)
