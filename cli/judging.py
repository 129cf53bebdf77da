"""`xdonnx verify` and `xdonnx gate`: two models compared, and a saved comparison judged again; neither needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from xdonnx.errors import JobError
from xdonnx_cli.configuration import Origins
from xdonnx_cli.ending import attempted
from xdonnx_cli.flags import STRICT, SWITCH, Data, Limits, Pixels, Sizes, Talk, output, running
from xdonnx_cli.output import command_line, put_json, tables
from xdonnx_cli.progress import told
from xdonnx_cli.terminal import stdout


def verify(
    teacher: Annotated[
        Path, typer.Argument(metavar="TEACHER", readable=False, help="An ONNX file.", show_default=False)
    ],
    student: Annotated[
        Path, typer.Argument(metavar="STUDENT", readable=False, help="The one to judge.", show_default=False)
    ],
    data: Data,
    pixels: Pixels,
    sizes: Sizes,
    limits: Limits,
    talk: Talk,
    strict: STRICT = False,
    report_dir: Annotated[Path | None, output("--report-dir", "DIR", "Write a report. Default: none.")] = None,
    device: Annotated[str, running("--device", "NAME", "cpu or cuda:0.")] = "cpu",
    seed: Annotated[int, running("--seed", "N", "Of every draw.", min=0)] = 0,
) -> int:
    """Compare any two ONNX files in onnxruntime: interface, answers, size, MACs, latency.

    The samples should be new to both. With --holdout F and the data flags and seed of a compress job, the very
    samples judge that judged there.
    """
    from xdonnx.judging import judged
    from xdonnx.paths import report_folder
    from xdonnx.publication import write_report
    from xdonnx.samples import Request
    from xdonnx_cli.show import show

    if report_dir is not None:
        report_folder(Path("verify"), report_dir)
    asked = {"teacher": teacher, "student": student, **vars(data)}
    with attempted(report_dir, asked, device=device, seed=seed) as attempt:
        gate, preprocess, shapes = limits.gate(strict=strict), pixels.preprocess(), sizes.shapes()
        held = data.holdout and data.held_out("0")
        wanted = Request(**{**vars(data), "holdout": held}, preprocess=preprocess, seed=seed)
        with told(talk) as log:
            how: dict[str, Any] = {"device": device, "command": command_line(), "log": attempt.noting(log)}
            report = judged(teacher, student, wanted, gate, input_shape=shapes, **how)
        written = write_report(report, report_dir)
        attempt.kept = True
    put_json(talk.json, report.model_dump_json(indent=2))
    show(tables(talk), report, written=written, quiet=talk.quiet)
    return report.exit_code


def gate(
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="A report.json, or its folder.", show_default=False)],
    limits: Limits,
    origins: Origins,
    strict: STRICT = False,
    json: Annotated[str | None, output("--json", "-|FILE", "The report as judged now.")] = None,
    report_dir: Annotated[Path | None, output("--report-dir", "DIR", "Write the report as judged now.")] = None,
    quiet: Annotated[bool, running("--quiet", SWITCH, "The verdict only.", "-q")] = False,
    verbose: Annotated[bool, running("--verbose", SWITCH, "Tracebacks.", "-v")] = False,
) -> int:
    """Judge a saved report again by other limits; without any, say again what it says.

    Limits that are not given are not judged, but for what compress always asks: a smaller file, not slower, something
    removed. --confidence or --warn-only alone judge the limits of the report in another way; they have to be typed.
    """
    talk = Talk(json=json, quiet=quiet, verbose=verbose)
    from xdonnx.gate import GATES, rejudge, softened
    from xdonnx.publication import write_report
    from xdonnx.report import read_report
    from xdonnx_cli.show import show

    saved = read_report(report)
    if strict or any(getattr(limits, name) is not None for name in GATES):
        saved = rejudge(saved, limits.gate(strict=strict))
    elif any(origins[name].source == "command line" for name in ("confidence", "warn_only")):
        if not saved.gates:
            raise JobError(
                "--confidence and --warn-only say how limits are judged, and there is none.\n  Give --max-drop 1."
            )
        saved = rejudge(saved, softened(saved, limits.gate()))
    written = write_report(saved, report_dir)
    put_json(json, saved.model_dump_json(indent=2))
    show(tables(talk) if json == "-" else stdout(), saved, written=written, quiet=quiet)
    return saved.exit_code
