"""`xdonnx sweep`: many jobs from one file, resumed where they stopped, and the curve that they make."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from xdonnx.errors import JobError, MachineError, did_you_mean
from xdonnx_cli.flags import SWITCH, Talk, output, running
from xdonnx_cli.output import command_line, put_json, tables
from xdonnx_cli.terminal import beside, bullets, heading, plain_table, say, shortened, stderr

if TYPE_CHECKING:
    from xdonnx.events import Event, Log
    from xdonnx.sweep.description import Choice, Description, Range, Running
    from xdonnx.sweep.results import SweepResults

BACKENDS = ("serial", "processes", "ray")
_OUT = "The folder of the sweep; what it holds is not done again. Default: NAME.sweep for NAME.toml, here."
_BACKEND = "serial, processes or ray: one trial after another, several at a time, or on a cluster."
_ADDRESS = "auto or HOST:PORT of a Ray cluster. Default: one is started on this machine."
_TRIALS = "Points of a search, in place of what the file says; more go on with what there is."
_COLOURS = {0: "bold green", 3: "bold red", 130: "bold yellow"}


def _schema(asked: bool) -> None:
    if asked:
        from xdonnx.sweep.results import schema

        typer.echo(json.dumps(schema(), indent=2))
        raise typer.Exit()


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="A TOML file; the README has one.", show_default=False)],
    talk: Talk,
    out: Annotated[Path | None, output("--out", "DIR", _OUT, "-o")] = None,
    dry_run: Annotated[bool, output("--dry-run", SWITCH, "Print every trial, done or not; write nothing.")] = False,
    schema: Annotated[
        bool, output("--schema", SWITCH, "Print the JSON Schema of sweep.json.", callback=_schema, is_eager=True)
    ] = False,
    backend: Annotated[str | None, running("--backend", "NAME", _BACKEND)] = None,
    jobs: Annotated[int | None, running("--jobs", "N", "Trials at a time; more than one means processes.", min=1)] = (
        None
    ),
    address: Annotated[str | None, running("--address", "ADDRESS", _ADDRESS)] = None,
    trials: Annotated[int | None, running("--trials", "N", _TRIALS, min=1)] = None,
) -> int:
    """Compress models in many ways and draw what each costs: methods, targets, structures and seeds, or a search.

    Every trial is a job of xdonnx compress, kept as soon as it is done: the same command goes on after Ctrl-C, a crash
    or new rows, and does nothing twice. DIR receives report.html, sweep.csv, sweep.md, sweep.json and, for each trial,
    its report and student. A trial whose gate fails is a result; the exit code is 3 if none passes.
    """
    del schema  # it has been printed
    if backend is not None and backend not in BACKENDS:
        near = did_you_mean(backend, BACKENDS)
        raise JobError(f"unknown --backend '{backend}'.{near}\n  Backends: {', '.join(BACKENDS)}.")
    work = _library()
    from xdonnx.sweep.description import read_sweep

    described = read_sweep(file)
    if trials is not None:
        if described.search is None:
            raise JobError(f"--trials {trials} is of a search, and '{file.name}' has no [search].\n  Leave it out.")
        described = replace(described, search=described.search.model_copy(update={"trials": trials}))
    run = _running(described.run, backend, jobs, address)
    folder = out or Path(f"{file.stem}.sweep")
    if dry_run:
        return _dry_run(described, folder, talk)
    if folder.exists() and not folder.is_dir():
        raise JobError(f"'{folder}' is a file.\n  Name a folder: -o DIR")
    with _told(talk) as log:
        results: SweepResults = work.run_sweep(described, folder, run=run, log=log, command=command_line())
    put_json(talk.json, results.model_dump_json(indent=2))
    _show(tables(talk), results, folder, quiet=talk.quiet)
    return results.exit_code


def _running(told: Running, backend: str | None, jobs: int | None, address: str | None) -> Running:
    """Return where trials are done: as it is typed, else as the file says, else as the other flags need it."""
    given: dict[str, Any] = {"backend": backend, "jobs": jobs, "address": address}
    changes = {name: value for name, value in given.items() if value is not None}
    if backend is None and "backend" not in told.model_fields_set:
        if address or told.address:
            changes["backend"] = "ray"
        elif (jobs or told.jobs or 1) > 1:
            changes["backend"] = "processes"
    return told.model_copy(update=changes)


def _library() -> Any:
    """Import what sweeps need, and torch with it."""
    try:
        import xdonnx.sweep.conduct
    except (ImportError, OSError, RuntimeError) as error:
        # A torch whose libraries are missing raises any of these.
        raise MachineError(f"torch does not import: {error}.\n  See what is wrong with it: xdonnx doctor") from error
    return xdonnx.sweep.conduct


def _dry_run(described: Description, folder: Path, talk: Talk) -> int:
    """Print what would be done and what is; a search is told by what it chooses from."""
    from xdonnx.sweep.conduct import RECORDS, state_of
    from xdonnx.sweep.records import read_records
    from xdonnx.sweep.trials import grid

    records = read_records(folder / RECORDS, mend=False)
    if described.search is not None:
        space = {name: _spaced(choices) for name, choices in {**described.axes, **described.space}.items()}
        many = described.search.trials * len(described.models) * len(described.seeds)
        put_json(talk.json, json.dumps({"search": space, "trials": many, "known": len(records)}, indent=2))
        for name, text in space.items():
            say(tables(talk), f"{name}: {text}")
        say(tables(talk), f"{described.search.trials} points for each of {len(described.models)} models", "dim")
        return 0
    kept = folder if described.run.students == "all" else None
    listed = [(state_of(trial, records, kept), trial) for trial in grid(described, folder)]
    found = [
        {"state": state, "key": trial.key, "model": trial.model, "choices": dict(trial.choices), "seed": trial.seed}
        for state, trial in listed
    ]
    put_json(talk.json, json.dumps(found, indent=2))
    for state, trial in listed:
        why = f": {' '.join(trial.refused.split())}" if trial.refused else ""
        say(tables(talk), f"{state:<7}  {trial}{why}")
    done = sum(state == "done" for state, _ in listed)
    say(tables(talk), f"{done} of {len(listed)} trials are done", "dim")
    return 0


def _spaced(choices: Range | tuple[Choice, ...]) -> str:
    if isinstance(choices, tuple):
        return ", ".join(choice.name for choice in choices)
    how = f" in steps of {choices.step:g}" if choices.step else " (log)" if choices.log else ""
    return f"{choices.low:g} to {choices.high:g}{how}"


@contextmanager
def _told(talk: Talk) -> Iterator[Log]:
    """Yield the log that draws a bar on a terminal, prints a line for each trial with -v, and else is silent."""
    console = stderr()
    if talk.verbose or talk.quiet or talk.no_progress or not console.is_terminal:
        yield lambda event: _line(console, event) if talk.verbose else None
        return
    columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def draw(event: Event) -> None:
            text = event.text if event.stage == "begin" else None
            bar.update(task, total=event.total, completed=event.done, description=text)

        yield draw


def _line(console: Console, event: Event) -> None:
    if event.stage == "trial":
        say(console, f"{event.done}/{event.total} {event.text}")


def _show(console: Console, results: SweepResults, folder: Path, *, quiet: bool) -> None:
    """Print the results: how many passed, the points of each model, what failed, where it is written."""
    from xdonnx.sweep.results import count_line, failures

    word = {0: "PASSED", 3: "REJECTED", 130: "INTERRUPTED"}.get(results.exit_code, "FAILED")
    line = Text(word, _COLOURS.get(results.exit_code, "bold red"))
    console.print(line.append(f"  {count_line(results)}", "default not bold"))
    if quiet:
        return
    for teacher in results.models:
        _points(console, results, teacher)
    if lost := failures(results):
        heading(console, "No student")
        bullets(console, [" ".join(text.split()) for text, _ in lost])
    if results.warnings:
        heading(console, "Warnings")
        bullets(console, results.warnings)
    heading(console, "Written")
    for name in ("report.html", "sweep.csv", "sweep.md", "sweep.json"):
        say(console, f"  {beside(folder / name)}")
    taken = f"{results.taken} trial{'s' * (results.taken != 1)} taken"
    say(console, f"  {taken}; the reports and students are in {beside(folder / 'trials')}", "dim")
    if results.status == "interrupted":
        say(stderr(), "The same command does the rest.")


def _points(console: Console, results: SweepResults, teacher: Any) -> None:
    from xdonnx.sweep.options import told
    from xdonnx.sweep.results import STAR, TITLES, caption, cost_text, ordered, quality_text, varied

    rows, names = ordered(results, teacher.name), varied(results)
    if not rows:
        return
    heading(console, teacher.name)
    table = plain_table("", *(f"{name}<" for name in names), TITLES[results.cost], results.quality, "passed")
    texts = [[told(point.choices.get(name, "")) for name in names] for point in rows]
    most = max(16, (console.width - 40) // max(1, len(names)))
    short = shortened([text for line in texts for text in line], most)
    for point, line in zip(rows, texts, strict=True):
        style = "bold" if point.optimal else ""
        numbers = [cost_text(point.cost), quality_text(point.quality, results.quality)]
        passed = f"{point.passed} of {len(point.trials)}"
        table.add_row(STAR * point.optimal, *(short[text] for text in line), *numbers, passed, style=style)
    console.print(table)
    say(console, caption(results, teacher, several=len(results.seeds) > 1), "dim")
