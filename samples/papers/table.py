"""Run a table - methods by shots per class by seeds - on given teachers and data, so that numbers can be checked.

python samples/papers/table.py samples/papers/digits.toml
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from description import Run, Table, read_table, runs
from drawing import cells, for_terminal, grids, markdown, plot, write_csv
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from xdonnx.errors import JobError, MachineError, XdonnxError
from xdonnx.sweep.local import processes, serial
from xdonnx.sweep.measuring import Done, Task
from xdonnx.sweep.records import Record, add_record, read_records

INTERRUPTED, TERMINATED = 130, 143
# What a line keeps of what a run came to.
KEPT = (
    "error", "final", "command", "macs", "bytes", "nonzero", "accuracy", "agreement", "teacher", "judged", "fitted",
    "seconds", "device", "version", "started",
)  # fmt: skip


def record_of(run: Run, done: Done) -> Record:
    """Return a line of runs.jsonl: the run, and what it came to."""
    line = {"key": run.key, "row": run.row, "method": run.method, "per_class": run.per_class, "seed": run.seed}
    line |= {name: done.record[name] for name in KEPT if name in done.record}
    if done.record["status"] != "failed":
        line["options"] = run.job.model_dump(mode="json", exclude_unset=True, exclude={"out"}, fallback=str)
    return line


def measured(waiting: Sequence[Run], jobs: int, begin: Callable[[Run], None]) -> Iterator[Record]:
    """Yield the record of every run as soon as it is there; `begin` is told of a run before it starts."""
    runs = {run.key: run for run in waiting}
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    tasks = [Task(key, run.job, threads) for key, run in runs.items()]
    with tempfile.TemporaryDirectory(prefix="xdonnx-table-") as name:
        here = serial(Path(name)) if threads is None else processes(Path(name), jobs, threads)
        with here as perform:
            for done in perform(tasks, lambda task: begin(runs[task.key])):
                yield record_of(runs[done.key], done)


@contextmanager
def progress(many: int) -> Iterator[tuple[Callable[[Run], None], Callable[[], None]]]:
    """Yield what tells a bar on stderr of a run and of its end; without a terminal it is silent."""
    console = Console(stderr=True, highlight=False)
    columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=many)

        def begin(run: Run) -> None:
            bar.update(task, description=described(run))

        yield begin, lambda: bar.advance(task)


def described(run: Run) -> str:
    """Return the name of a run for people."""
    shots = "all samples" if run.per_class is None else f"{run.per_class} per class"
    return f"{run.row} | {shots} | {run.method} | seed {run.seed}"


def chosen(listed: Sequence[Run], given: argparse.Namespace) -> list[Run]:
    """Return the runs that --only, --methods and --seeds name, each key once.

    Raises
    ------
    JobError
        One of them names nothing.
    """
    for flag, patterns, names in (
        ("--only", given.only, [run.row for run in listed]),
        ("--methods", given.methods, [run.method for run in listed]),
        ("--seeds", given.seeds, [str(run.seed) for run in listed]),
    ):
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in names):
                choices = ", ".join(f"'{name}'" for name in dict.fromkeys(names))
                raise JobError(f"{flag} '{pattern}' matches nothing in '{given.table.name}'.\n  Choices: {choices}.")
    kept = [
        run
        for run in listed
        if _matches(run.row, given.only)
        and _matches(run.method, given.methods)
        and _matches(str(run.seed), given.seeds)
    ]
    return list({run.key: run for run in reversed(kept)}.values())[::-1]


def _matches(name: str, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)


def perform(waiting: Sequence[Run], records: dict[str, Record], path: Path, jobs: int) -> int:
    """Do the runs; each is a line of runs.jsonl as soon as it is done. Return how many are to be tried again."""
    failed = 0
    with progress(len(waiting)) as (begin, end):
        for record in measured(waiting, jobs, begin):
            records[record["key"]] = record
            if record["final"]:
                add_record(path, record)
            else:
                failed += 1
            end()
    return failed


def draw(table: Table, listed: Sequence[Run], records: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Print what is done of the whole table, and write table.csv, table.md and table.png."""
    found = cells(table, listed, records)
    shown = grids(table, found)
    console = Console(highlight=False, markup=False, emoji=False)
    for grid in shown:
        console.print(for_terminal(grid))
        for text in (grid.caption, *(f"n/a, {note}" for note in grid.notes)):
            console.print(Text(text, "dim"))
        console.print()
    write_csv(out / "table.csv", table, found)
    (out / "table.md").write_text(markdown(table.title, shown), encoding="utf-8")
    if shown:
        plot(out / "table.png", table.title, shown)
    console.print(Text(f"{out}: runs.jsonl, table.csv, table.md, table.png"), soft_wrap=True)


def show_list(picked: Sequence[Run], records: Mapping[str, Mapping[str, Any]]) -> None:
    """Print every run and whether it is done."""
    console = Console(highlight=False, markup=False, emoji=False)
    for run in picked:
        mark = "todo" if run.key not in records else "n/a " if records[run.key]["error"] else "done"
        console.print(Text(f"{mark}  {described(run)}"), soft_wrap=True)
    done = sum(run.key in records for run in picked)
    console.print(Text(f"{done} of {len(picked)} runs done"), soft_wrap=True)


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="table.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", type=Path, metavar="TABLE.toml", help="what to run; see the README beside this script")
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", help="default: NAME.table for NAME.toml, here")
    parser.add_argument("--data", type=Path, metavar="DIR", help="what paths are relative to; default: $XDONNX_DATA")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="run only these rows; repeat for more")
    parser.add_argument("--methods", action="append", metavar="PATTERN", help="run only these; repeat for more")
    parser.add_argument("--seeds", type=lambda text: text.split(","), metavar="0,1", help="run only these")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes; seconds then say little")
    parser.add_argument("--list", action="store_true", help="print what would run and what is done; run nothing")
    parser.add_argument("--draw", action="store_true", help="show and write what is done; run nothing")
    parser.add_argument("--strict", action="store_true", help="run again what another xdonnx did")
    given = parser.parse_args(words)
    if given.jobs < 1:
        parser.error(f"--jobs {given.jobs}: at least 1 process.")
    given.out = given.out or Path(f"{given.table.stem}.table")
    given.data = given.data or (Path(os.environ["XDONNX_DATA"]) if os.environ.get("XDONNX_DATA") else None)
    return given


def start(words: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    Raises
    ------
    XdonnxError
        The table is wrong, or the machine lacks something.
    """
    given = _arguments(words)
    table = read_table(given.table)
    listed = runs(table, given.table, given.data, strict=given.strict)
    picked = chosen(listed, given)
    path = given.out / "runs.jsonl"
    records = read_records(path)
    if given.list:
        show_list(picked, records)
        return 0
    if importlib.util.find_spec("matplotlib") is None:
        raise MachineError("the picture needs matplotlib.\n  Install it: python -m pip install '.[papers]'")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"cannot make '{given.out}': {error.strerror}.\n  Name another folder: -o DIR") from error
    known = sum(run.key in records for run in picked)
    waiting = [] if given.draw else [run for run in picked if run.key not in records]
    try:
        failed = perform(waiting, records, path, given.jobs)
    except KeyboardInterrupt:
        done = sum(run.key in records for run in picked)
        _say(f"interrupted: {done} of {len(picked)} runs are done, in '{path}'.\n  The same command does the rest.")
        return INTERRUPTED
    draw(table, listed, records, given.out)
    _say(f"{len(waiting)} runs taken, {known} were there.")
    if failed:
        _say(f"error: {failed} runs failed, and are tried again next time; see the notes above.")
    return 1 if failed else 0


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, markup=False, emoji=False).print(Text(text), soft_wrap=True)


def main() -> None:
    """Run the script on what was typed, and end the process with its exit code."""
    # As an exception it unwinds, and temporary folders and workers go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    warnings.simplefilter("ignore")
    try:
        code = start(sys.argv[1:])
    except KeyboardInterrupt:
        _say("interrupted")
        code = INTERRUPTED
    except XdonnxError as error:
        _say(f"error: {error}")
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
