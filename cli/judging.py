"""`xdonnx verify` and `xdonnx gate`: two models compared, and a saved comparison judged again; neither needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xdonnx.errors import JobError
from xdonnx_cli.flags import STRICT, SWITCH, Data, Limits, Pixels, Sizes, Talk, output, running
from xdonnx_cli.output import check_json, command_line, put_json, tables
from xdonnx_cli.progress import told
from xdonnx_cli.terminal import stdout

if TYPE_CHECKING:
    from xdonnx.events import Event, Log
    from xdonnx.images import Preprocess
    from xdonnx.model import Port
    from xdonnx.shots import Shots, Unread


def verify(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="An ONNX file.", show_default=False)],
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="The one to judge.", show_default=False)],
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
    gate, preprocess, shapes = limits.gate(strict=strict), pixels.preprocess(), sizes.shapes()
    check_json(talk.json)
    from xdonnx.doctor import check_device
    from xdonnx.model import interface, read_proto, sized
    from xdonnx.preprocessing import check_samples
    from xdonnx.publication import write_report
    from xdonnx.runtime import open_session
    from xdonnx.verification import verify as compare
    from xdonnx_cli.show import show

    if report_dir is not None and report_dir.exists() and not report_dir.is_dir():
        raise JobError(f"the report cannot go to '{report_dir}': that is a file.\n  Name a folder.")
    check_device(device)
    proto, session = read_proto(teacher), open_session(teacher)
    ports = sized(interface(proto).inputs, shapes)
    heard: list[str] = []
    with told(talk) as tell:

        def log(event: Event) -> None:
            if event.level == "warning":
                heard.append(event.text)
            tell(event)

        judges, found = _judges(data, preprocess, ports, seed, log)
        if found is not None:
            check_samples(proto, session, ports, found, preprocess, log)
        report = compare(
            teacher,
            student,
            judges,
            gate,
            device=device,
            seed=seed,
            command=command_line(),
            job={"preprocess": vars(preprocess), "gate": vars(gate), **vars(data)},
            shots_path=", ".join(data.shots or ["synthetic"]),
            log=log,
        )
    report = report.model_copy(update={"warnings": tuple(dict.fromkeys((*heard, *report.warnings)))})
    written = [] if report_dir is None else write_report(report, report_dir)
    put_json(talk.json, report.model_dump_json(indent=2))
    show(tables(talk), report, written=written, quiet=talk.quiet)
    return report.exit_code


def _judges(
    data: Data, preprocess: Preprocess, ports: Sequence[Port], seed: int, log: Log
) -> tuple[Shots, Unread | None]:
    """Return the samples that judge: all, those drawn, or those a compress job would hold out; and where they lie."""
    import numpy as np

    from xdonnx.draw import draw
    from xdonnx.shots import list_shots, synthetic

    if data.synthetic_shots is not None:
        if data.shots:
            raise JobError("--shots and --synthetic-shots are both given.\n  Leave the random ones out.")
        return synthetic(ports, data.synthetic_shots, np.random.default_rng(seed)), None
    if not data.shots:
        raise JobError("no samples.\n  Pass --shots PATH: a folder of images, an .npz or an .npy.")
    how: dict[str, Any] = {"skip_bad": data.skip_bad, "log": log}
    found = list_shots(data.shots, ports, preprocess, labels=data.labels, **how)
    held = data.held_out("0")
    try:
        fraction: float | None = float(held)
    except ValueError:
        fraction = None
    rows = draw(found, per_class=data.per_class, max_shots=data.max_shots, holdout=fraction, seed=seed)[1]
    if fraction is None:
        found = list_shots([held], ports, preprocess, **how)
        rows = np.arange(len(found))
    return found.stream(rows), found


def gate(
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="A report.json, or its folder.", show_default=False)],
    limits: Limits,
    strict: STRICT = False,
    json: Annotated[str | None, output("--json", "-|FILE", "The report as judged now.")] = None,
    report_dir: Annotated[Path | None, output("--report-dir", "DIR", "Write the report as judged now.")] = None,
    quiet: Annotated[bool, running("--quiet", SWITCH, "The verdict only.", "-q")] = False,
    verbose: Annotated[bool, running("--verbose", SWITCH, "Tracebacks.", "-v")] = False,
) -> int:
    """Judge a saved report again by other limits; without any, say again what it says.

    Limits that are not given are not judged, but for what compress always asks: a smaller file, not slower, something
    removed.
    """
    talk = Talk(json=json, quiet=quiet, verbose=verbose)
    check_json(json)
    from xdonnx.gate import GATES, rejudge
    from xdonnx.report import read_report
    from xdonnx_cli.show import show

    saved = read_report(report)
    if strict or any(getattr(limits, name) is not None for name in GATES):
        saved = rejudge(saved, limits.gate(strict=strict))
    elif limits.given:
        raise JobError(
            "--confidence and --warn-only say how limits are judged, and there is none.\n  Give --max-drop 1."
        )
    written = []
    if report_dir is not None:
        from xdonnx.publication import write_report

        written = write_report(saved, report_dir)
    put_json(json, saved.model_dump_json(indent=2))
    show(tables(talk) if json == "-" else stdout(), saved, written=written, quiet=quiet)
    return saved.exit_code
