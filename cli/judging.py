"""`xdonnx verify` and `xdonnx gate`: two models compared, and a saved comparison judged again; neither needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xdonnx.errors import JobError, MachineError
from xdonnx_cli.flags import SWITCH, Data, Limits, Pixels, Sizes, Talk, output, running
from xdonnx_cli.output import check_json, command_line, put_json, tables
from xdonnx_cli.progress import told
from xdonnx_cli.terminal import stdout

if TYPE_CHECKING:
    from xdonnx.events import Log
    from xdonnx.images import Preprocess
    from xdonnx.model import Port
    from xdonnx.shots import Shots


def verify(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="An ONNX file.", show_default=False)],
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="The one to judge.", show_default=False)],
    data: Data,
    pixels: Pixels,
    sizes: Sizes,
    limits: Limits,
    talk: Talk,
    report_dir: Annotated[Path | None, output("--report-dir", "DIR", "Write a report. Default: none.")] = None,
    device: Annotated[str, running("--device", "NAME", "cpu or cuda:0.")] = "cpu",
    seed: Annotated[int, running("--seed", "N", "Of every draw.", min=0)] = 0,
) -> int:
    """Compare any two ONNX files in onnxruntime: interface, answers, size, MACs, latency.

    The samples should be new to both. With --holdout F and the data flags and seed of a compress job, the very
    samples judge that judged there.
    """
    gate, preprocess, shapes = limits.gate(), pixels.preprocess(), sizes.shapes()
    check_json(talk.json)
    from xdonnx.model import interface, read_proto, sized
    from xdonnx.report import write_report
    from xdonnx.runtime import open_session
    from xdonnx.verification import verify as compare
    from xdonnx_cli.show import show

    if report_dir is not None and report_dir.exists() and not report_dir.is_dir():
        raise JobError(f"the report cannot go to '{report_dir}': that is a file.\n  Name a folder.")
    _check_device(device)
    ports = sized(interface(read_proto(teacher)).inputs, shapes)
    open_session(teacher)
    with told(talk) as log:
        judges = _judges(data, preprocess, ports, seed, log)
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
    if report_dir is not None:
        write_report(report, report_dir)
    put_json(talk.json, report.model_dump_json(indent=2))
    written = [] if report_dir is None else [report_dir / "report.json", report_dir / "summary.md"]
    show(tables(talk), report, written=written, quiet=talk.quiet)
    return report.exit_code


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    name, _, number = device.partition(":")
    if name != "cuda" or not (number.isdecimal() or not number):
        raise JobError(f"unknown device '{device}'.\n  Devices: cpu, cuda:0.")
    from xdonnx.doctor import usable

    if not usable(device):
        raise MachineError(f"onnxruntime cannot run on '{device}'.\n  See what is missing: xdonnx doctor")


def _judges(data: Data, preprocess: Preprocess, ports: Sequence[Port], seed: int, log: Log) -> Shots:
    """Return the samples that judge: all, those drawn, or those that a compress job would hold out."""
    import numpy as np

    from xdonnx.shots import read_shots, split, synthetic

    if data.synthetic_shots is not None:
        if data.shots:
            raise JobError("--shots and --synthetic-shots are both given.\n  Leave the random ones out.")
        return synthetic(ports, data.synthetic_shots, np.random.default_rng(seed))
    if not data.shots:
        raise JobError("no samples.\n  Pass --shots PATH: a folder of images, an .npz or an .npy.")
    how: dict[str, Any] = {"skip_bad": data.skip_bad, "log": log}
    whole = read_shots(data.shots, ports, preprocess, labels=data.labels, **how)
    held = data.held_out("0")
    try:
        holdout: float | Shots = float(held)
    except ValueError:
        holdout = read_shots([held], ports, preprocess, **how)
    return split(whole, per_class=data.per_class, max_shots=data.max_shots, holdout=holdout, seed=seed)[1]


def gate(
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="A report.json, or its folder.", show_default=False)],
    limits: Limits,
    json: Annotated[str | None, output("--json", "-|FILE", "The report as judged now.")] = None,
    quiet: Annotated[bool, running("--quiet", SWITCH, "The verdict only.", "-q")] = False,
    verbose: Annotated[bool, running("--verbose", SWITCH, "Tracebacks.", "-v")] = False,
) -> int:
    """Judge a saved report again by other limits; without any, say again what it says.

    Limits that are not given are not judged.
    """
    talk = Talk(json=json, quiet=quiet, verbose=verbose)
    check_json(json)
    from xdonnx.gate import GATES, rejudge
    from xdonnx.report import read_report
    from xdonnx_cli.show import show

    saved = read_report(report)
    if any(getattr(limits, name) is not None for name in GATES):
        saved = rejudge(saved, limits.gate())
    elif limits.given:
        raise JobError(
            "--confidence and --warn-only say how limits are judged, and there is none.\n  Give --max-drop 1."
        )
    put_json(json, saved.model_dump_json(indent=2))
    show(tables(talk) if json == "-" else stdout(), saved, quiet=quiet)
    return saved.exit_code
