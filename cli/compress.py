"""`xdonnx compress`: flags into a job, the job run, its report shown and kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xdonnx.errors import MachineError
from xdonnx_cli.configuration import Origins
from xdonnx_cli.ending import attempted
from xdonnx_cli.flags import (
    MATCH,
    PLAN,
    SMALLEST,
    STUDENT,
    SWITCH,
    Data,
    Limits,
    Pixels,
    Recipe,
    Sizes,
    Talk,
    Target,
    output,
    running,
)
from xdonnx_cli.output import command_line, put_json, tables
from xdonnx_cli.progress import told
from xdonnx_cli.terminal import say, stderr
from xdonnx_cli.wanted import check_cheaply, fields, library

if TYPE_CHECKING:
    from xdonnx.report import Report
    from xdonnx.wanted import Job


_MEMORY = "Bytes that may be taken, such as 8GB; what has no room goes to files. Default: 60% of what is free."
_EXTERNAL = "auto, always or never: weights in OUT.data beside the file. auto: past 2 GiB."


@dataclass(frozen=True)
class Files:
    """Where results go, and the rest of the run."""

    out: Annotated[Path, output("--out", "OUT", "The student.", "-o")]
    force: Annotated[bool, output("--force", SWITCH, "Replace an OUT that exists.")] = False
    external_data: Annotated[str, output("--external-data", "WHEN", _EXTERNAL)] = "auto"
    report_dir: Annotated[Path | None, output("--report-dir", "DIR", "Default: student.report for student.onnx.")] = (
        None
    )
    dry_run: Annotated[bool, output("--dry-run", SWITCH, "Print the job and the plan; write nothing.")] = False
    device: Annotated[str, running("--device", "NAME", "auto, cpu or cuda:0.")] = "auto"
    seed: Annotated[int, running("--seed", "N", "Of every draw.", min=0)] = 0
    memory: Annotated[str | None, running("--memory", "BYTES", _MEMORY)] = None
    resume: Annotated[bool, running("--resume", SWITCH, "Go on with a job that was stopped.")] = False


def compress(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", readable=False, help="The teacher: an ONNX file.", show_default=False)
    ],
    data: Data,
    pixels: Pixels,
    sizes: Sizes,
    target: Target,
    recipe: Recipe,
    limits: Limits,
    files: Files,
    talk: Talk,
    origins: Origins,
    plan: Annotated[Path | None, PLAN] = None,
    smallest: Annotated[bool, SMALLEST] = False,
    student: Annotated[Path | None, STUDENT] = None,
    match: Annotated[Path | None, MATCH] = None,
) -> int:
    """Make an ONNX CNN smaller and faster from a handful of samples, and check it in onnxruntime.

    OUT is written only if the student keeps every limit of the gate; otherwise it is kept as OUT with .rejected.onnx
    and the exit code is 3. The report is written in both cases. Three limits hold unasked: the file smaller, the
    student not slower beyond the noise, weights removed. --warn-only smaller lifts the first, --max-latency-ratio 1.5
    moves the second.
    """
    from xdonnx.paths import check_student, partial_folder, report_folder

    folder = report_folder(files.out, files.report_dir)
    options = {
        **vars(recipe),
        "method": tuple(recipe.method or ("cross",)),
        "pool": tuple(recipe.pool or ()),
        "smallest": smallest,
        "student": student,
        "match": match,
    }
    if files.dry_run:
        check_cheaply(model, target, options["method"], student)
        return _dry_run(_job(model, plan, options, fields(data, pixels, sizes, target), limits, files), origins, talk)
    asked = {"model": model, "out": files.out, **vars(data), **vars(target), **options, "plan": plan}
    with attempted(_own(folder, files), asked, device=files.device, seed=files.seed) as attempt:
        check_cheaply(model, target, options["method"], student)
        check_student(files.out, model, force=files.force, external=files.external_data)
        job = _job(model, plan, options, fields(data, pixels, sizes, target), limits, files)
        if files.resume and not partial_folder(files.out).exists():
            # Told before the work too: a name may be mistyped.
            say(stderr(), f"--resume: nothing is kept for '{files.out}'; the job starts anew.", "yellow")
        with told(talk) as log:
            report: Report = library().run(job, attempt.noting(log), command=command_line())
        drawn = _published(report, job, folder)
        attempt.kept = True
    return _finish(report, job, drawn, talk)


def _own(folder: Path, files: Files) -> Path | None:
    """Return the folder where a failure is reported: the one that was named, or an old one beside OUT.

    Without --force an OUT that exists stays, and so does the report beside it, which is that of OUT.
    """
    stays = files.out.exists() and not files.force
    return folder if files.report_dir is not None or (folder.is_dir() and not stays) else None


def _job(
    model: Path, plan: Path | None, options: dict[str, Any], wanted: dict[str, Any], limits: Limits, files: Files
) -> Job:
    kept = {name: value for name, value in vars(files).items() if name not in ("report_dir", "dry_run")}
    made: Job = library().Job(model=model, plan=plan, **wanted, **options, gate=limits.gate(), **kept)
    return made


def _dry_run(job: Job, origins: Origins, talk: Talk) -> int:
    from xdonnx.budget import MEASURED
    from xdonnx_cli.plan import as_dict, show_plan

    work = library()
    with told(talk) as log:
        ready = work.prepared(job, log, writes=False)
        if job.measured() or job.budget().kind in MEASURED or job.smallest:
            ready = work.planned(job, ready, work.opened(ready, log), log)
    put_json(talk.json, json.dumps(as_dict(job, ready, origins), indent=2))
    if not talk.quiet:
        show_plan(tables(talk), job, ready, origins)
    return 0


def _published(report: Report, job: Job, folder: Path) -> list[Path]:
    from xdonnx.publication import write_report

    try:
        return write_report(report, folder)
    except MachineError as error:
        raise MachineError(
            f"{error}\n  The student is whole, and {report.status}: '{_student(report, job)}'."
        ) from error


def _student(report: Report, job: Job) -> Path:
    from xdonnx.paths import rejected_path

    return job.out if report.exit_code == 0 else rejected_path(job.out)


def _finish(report: Report, job: Job, drawn: Sequence[Path], talk: Talk) -> int:
    """Show the report, and what was written."""
    from xdonnx.model import data_path
    from xdonnx_cli.show import show

    put_json(talk.json, report.model_dump_json(indent=2))
    student = _student(report, job)
    beside = [path for path in (data_path(student),) if path.is_file()]
    show(tables(talk), report, written=[student, *beside, *drawn], quiet=talk.quiet)
    return report.exit_code
