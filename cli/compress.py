"""`xdonnx compress`: flags into a job, the job run, its report shown and kept."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xdonnx.errors import MachineError
from xdonnx_cli.configuration import Origins
from xdonnx_cli.flags import PLAN, SWITCH, Data, Limits, Pixels, Recipe, Sizes, Talk, Target, output, running
from xdonnx_cli.output import check_json, command_line, put_json, tables
from xdonnx_cli.progress import told
from xdonnx_cli.wanted import fields, library

if TYPE_CHECKING:
    from xdonnx.job import Job
    from xdonnx.report import Report


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


def compress(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The teacher: an ONNX file.", show_default=False)],
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
) -> int:
    """Make an ONNX CNN smaller and faster from a handful of samples, and check it in onnxruntime.

    OUT is written only if the student keeps every limit of the gate; otherwise it is kept as OUT with .rejected.onnx
    and the exit code is 3. The report is written in both cases. Three limits hold unasked: the file smaller, the
    student not slower beyond the noise, weights removed. --warn-only smaller lifts the first, --max-latency-ratio 1.5
    moves the second.
    """
    gate, wanted = limits.gate(), fields(data, pixels, sizes, target)
    check_json(talk.json)
    from xdonnx.paths import report_folder

    folder = report_folder(files.out, files.report_dir)
    work = library()
    job: Job = work.Job(
        model=model,
        out=files.out,
        plan=plan,
        **wanted,
        **{**vars(recipe), "method": tuple(recipe.method or ("cross",))},
        gate=gate,
        force=files.force,
        external_data=files.external_data,
        device=files.device,
        seed=files.seed,
    )
    if files.dry_run:
        return _dry_run(work, job, origins, talk)
    with told(talk) as log:
        report: Report = work.run(job, log, command=command_line())
    return _finish(report, job, folder, talk)


def _dry_run(work: Any, job: Job, origins: Origins, talk: Talk) -> int:
    from xdonnx_cli.plan import as_dict, show_plan

    with told(talk) as log:
        ready = work.prepared(job, log, writes=False)
        if job.measured():
            ready = replace(ready, plan=work.planned(job, ready, work.opened(ready, log), log))
    put_json(talk.json, json.dumps(as_dict(job, ready, origins), indent=2))
    if not talk.quiet:
        show_plan(tables(talk), job, ready, origins)
    return 0


def _finish(report: Report, job: Job, folder: Path, talk: Talk) -> int:
    """Keep the report and show it."""
    from xdonnx.publication import write_report
    from xdonnx_cli.show import show

    student = Path(report.files.student.path) if report.files.student else job.out
    try:
        drawn = write_report(report, folder)
    except MachineError as error:
        raise MachineError(f"{error}\n  The student is whole, and {report.status}: '{student}'.") from error
    put_json(talk.json, report.model_dump_json(indent=2))
    beside = [path for path in (student.with_name(f"{student.name}.data"),) if path.is_file()]
    written = [student, *beside, *drawn]
    show(tables(talk), report, written=written, quiet=talk.quiet)
    return report.exit_code
