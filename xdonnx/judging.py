"""Two models compared on the samples that were asked for: what `xdonnx verify` does, from a shell and from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from xdonnx.doctor import check_device
from xdonnx.events import Log, hearing, ignore
from xdonnx.gate import Gate
from xdonnx.limits import warned
from xdonnx.model import interface, read_proto, sized
from xdonnx.preprocessing import check_samples
from xdonnx.report import Report
from xdonnx.runtime import open_session
from xdonnx.samples import Request, apart
from xdonnx.shots import Unread
from xdonnx.verification import verify


def judged(
    teacher: Path,
    student: Path,
    asked: Request,
    gate: Gate,
    *,
    input_shape: Mapping[str, Sequence[int]] | None = None,
    device: str = "cpu",
    command: str = "",
    log: Log = ignore,
) -> Report:
    """Compare two models on samples, and judge what was found.

    Parameters
    ----------
    teacher, student : Path
    asked : Request
        The samples. With the hold-out, draw and seed of a compress job, the very samples judge that judged there.
    gate : Gate
    input_shape : dict of str to shape, optional
        Of inputs whose sizes the graph leaves free.
    device : str
        'cpu' or 'cuda:0'.
    command : str
        What the user typed or called, for the report.
    log : Log

    Raises
    ------
    XdonnxError
        Of the kind whose exit code fits.
    """
    heard: list[str] = []
    note = hearing(log, heard)
    check_device(device)
    proto, session = read_proto(teacher), open_session(teacher)
    ports = sized(interface(proto).inputs, dict(input_shape or {}))
    whole, held = asked.read(ports, note)
    # Those that fit are looked at only to leave them out, so they need not be held.
    _, judges = apart(whole, held, asked, log=note, stream=True)
    if isinstance(whole, Unread):
        check_samples(proto, session, ports, whole, asked.preprocess, note)
    report = verify(
        teacher,
        student,
        judges,
        gate,
        device=device,
        seed=asked.seed,
        command=command,
        job={"preprocess": vars(asked.preprocess), "gate": vars(gate), **asked.told()},
        shots_path=", ".join(asked.names) or "synthetic",
        log=note,
    )
    return report.model_copy(update={"warnings": warned(report, heard)})
