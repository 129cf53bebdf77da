"""What the commands do, from Python: `compress`, `verify` and `decompose`, with samples from files or from memory.

Every option is a flag of the command of the same name, with its meaning and its default.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, get_type_hints

import numpy as np
import onnx

from xdonnx.decomposition import Decomposition, decomposed, wanted
from xdonnx.errors import JobError, MachineError, did_you_mean
from xdonnx.events import Log, ignore
from xdonnx.gate import Gate
from xdonnx.images import Preprocess
from xdonnx.judging import judged
from xdonnx.keywords import CompressOptions, DecomposeOptions, Model, Samples, VerifyOptions
from xdonnx.model import write_proto
from xdonnx.paths import report_folder
from xdonnx.publication import write_report
from xdonnx.report import FileInfo, Report
from xdonnx.samples import Request

if TYPE_CHECKING:
    # It brings torch, which `verify` does without.
    from xdonnx.wanted import Job

# What a report calls a model that has no path.
MEMORY = "(in memory)"
# What an option of one value may be given; numpy's numbers are numbers too.
_PLAIN: Mapping[Any, tuple[Any, str]] = {
    float: (Real, "a number, such as 0.5"),
    int: (Integral, "a whole number, such as 8"),
    bool: ((bool, np.bool_), "True or False"),
    str: (str, "text"),
}
_PIXELS = tuple(field.name for field in fields(Preprocess))
_LIMITS = tuple(field.name for field in fields(Gate))


def compress(
    model: Model,
    shots: Samples | None = None,
    out: Model | None = None,
    *,
    progress: Log = ignore,
    **options: Unpack[CompressOptions],
) -> Report:
    """Make an ONNX CNN smaller and faster from a handful of samples, and check it in onnxruntime.

    Parameters
    ----------
    model : path or onnx.ModelProto
        The teacher; it is not changed.
    shots : path, sequence of paths, array, dict, tuple, iterable or Shots
        The samples. From files: what `--shots` takes. From memory: an array (n, ...); `(images, labels)`; a dict of
        an array for each graph input, and of 'labels'; or any iterable of batches in these forms, such as a torch
        DataLoader. uint8 images are preprocessed, floating arrays are taken as they are.
    out : path or onnx.ModelProto, optional
        Where the student goes. A ModelProto receives it. None keeps the report alone.
    progress : callable
        Told of every step as an `xdonnx.events.Event`.
    **options
        As `CompressOptions` lists them: the flags of `xdonnx compress`.

    Returns
    -------
    Report
        Exit code 0: the student is in `out`. 3: a gate failed and `out` is untouched; beside a path the candidate
        lies as `.rejected.onnx`.

    Raises
    ------
    XdonnxError
        Of the kind whose exit code fits; nothing was written.

    Examples
    --------
    >>> report = xdonnx.compress("model.onnx", loader, "student.onnx", macs=0.5, max_drop=1)  # doctest: +SKIP
    >>> report.status, report.fidelity.drop.value  # doctest: +SKIP
    ('passed', 0.4)
    """
    given = _known(options, CompressOptions)
    asked, folder = _request(shots, given), given.pop("report_dir", None)
    work = _library()
    with tempfile.TemporaryDirectory(prefix="xdonnx.") as scratch:
        kept = isinstance(out, (str, os.PathLike))
        student = Path(out) if isinstance(out, (str, os.PathLike)) else Path(scratch) / "student.onnx"
        _check_empty(out, given)
        goes = report_folder(student, Path(folder) if folder else None) if kept or folder else None
        job = _job(work, given, asked, model=_on_disk(model, Path(scratch) / "model.onnx"), out=student)
        if asked.holdout is None:
            asked = replace(asked, holdout=job.holdout)
        command = _call("compress", (model, shots, out), options)
        report: Report = work.run(job, progress, command=command, asked=asked if asked.held else None)
        if isinstance(out, onnx.ModelProto) and report.exit_code == 0:
            out.CopyFrom(onnx.load(student))
    report = _without_paths(report, scratch)
    if goes is not None:
        write_report(report, goes, log=progress)
    return report


def verify(
    teacher: Model,
    student: Model,
    shots: Samples | None = None,
    gate: Gate | None = None,
    *,
    progress: Log = ignore,
    **options: Unpack[VerifyOptions],
) -> Report:
    """Compare any two ONNX models in onnxruntime: interface, answers, size, MACs, latency. Never imports torch.

    Parameters
    ----------
    teacher, student : path or onnx.ModelProto
    shots : path, sequence of paths, array, dict, tuple, iterable or Shots
        The samples that judge, in any form that `compress` takes. They should be new to both.
    gate : Gate, optional
        What the student must keep; or give its fields as options.
    progress : callable
        Told of every step as an `xdonnx.events.Event`.
    **options
        As `VerifyOptions` lists them: the flags of `xdonnx verify`.

    Returns
    -------
    Report
        Exit code 0: passed. 3: a gate failed. 6: the interface differs, or answers are no numbers.

    Raises
    ------
    XdonnxError
        Of the kind whose exit code fits.

    Examples
    --------
    >>> report = xdonnx.verify("model.onnx", "student.onnx", (images, labels), max_drop=1)  # doctest: +SKIP
    >>> assert report.status == "passed", report.reasons  # doctest: +SKIP
    """
    given = _known(options, VerifyOptions) | ({} if gate is None else {"gate": gate})
    limits, folder = _gate(given), given.pop("report_dir", None)
    how = {name: given.pop(name) for name in ("device", "input_shape") if name in given}
    asked = _request(shots, given)
    goes = report_folder(Path("verify"), Path(folder)) if folder else None
    with tempfile.TemporaryDirectory(prefix="xdonnx.") as scratch:
        before, after = (_on_disk(teacher, Path(scratch) / "t.onnx"), _on_disk(student, Path(scratch) / "s.onnx"))
        command = _call("verify", (teacher, student, shots), options)
        report = judged(before, after, asked, limits, **how, command=command, log=progress)
    report = _without_paths(report, scratch)
    if goes is not None:
        write_report(report, goes, log=progress)
    return report


def decompose(
    model: Model,
    out: Model | None = None,
    *,
    progress: Log = ignore,
    **options: Unpack[DecomposeOptions],
) -> Decomposition:
    """Take the layers of an ONNX CNN apart into smaller ones, from its weights alone. Needs no samples and no torch.

    Parameters
    ----------
    model : path or onnx.ModelProto
        The teacher; it is not changed.
    out : path or onnx.ModelProto, optional
        Where the student goes. A ModelProto receives it. None only says what it would come to.
    progress : callable
        Told of every step as an `xdonnx.events.Event`.
    **options
        As `DecomposeOptions` lists them: the flags of `xdonnx decompose`.

    Returns
    -------
    Decomposition
        What each layer became, and what teacher and student cost.

    Raises
    ------
    XdonnxError
        Of the kind whose exit code fits; nothing was written.

    Examples
    --------
    >>> found = xdonnx.decompose("model.onnx", "student.onnx", macs=0.6)  # doctest: +SKIP
    >>> found.student.macs / found.teacher.macs  # doctest: +SKIP
    0.598
    """
    given = _known(options, DecomposeOptions)
    sizes = given.pop("input_shape", None)
    how: dict[str, Any] = {name: given.pop(name) for name in ("force", "external_data") if name in given}
    _check_empty(out, how)
    if given.get("round_to") == "auto":
        del given["round_to"]
    for name in given.keys() & {"include", "exclude"}:
        given[name] = (given[name],) if isinstance(given[name], str) else tuple(given[name])
    with tempfile.TemporaryDirectory(prefix="xdonnx.") as scratch:
        student = Path(out) if isinstance(out, (str, os.PathLike)) else Path(scratch) / "student.onnx"
        teacher = _on_disk(model, Path(scratch) / "model.onnx")
        how["writes"] = out is not None
        found = decomposed(teacher, student, wanted(**given), sizes=sizes, log=progress, **how)
        if isinstance(out, onnx.ModelProto):
            out.CopyFrom(onnx.load(student))
    return found


def _check_empty(out: Model | None, given: Mapping[str, Any]) -> None:
    if isinstance(out, onnx.ModelProto) and out.graph.node and not given.get("force"):
        raise JobError("the model to write into holds a graph already.\n  Pass an empty one, or force=True.")


def _known(options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return the options that were given a value; raises JobError for names that are none, and values of no use."""
    kinds = get_type_hints(kind)
    for name, value in options.items():
        if name not in kinds:
            near = did_you_mean(name, kinds)
            raise JobError(f"unknown option '{name}'.{near}\n  Options are the flags of the command: max_drop=1.")
        fits, words = _PLAIN.get(kinds[name], (object, ""))
        if value is not None and not isinstance(value, fits):
            raise JobError(f"{name} is {value!r}.\n  It takes {words}.")
    return {name: value for name, value in options.items() if value is not None}


def _request(shots: Samples | None, given: dict[str, Any]) -> Request:
    """Take what concerns the samples out of the options."""
    names = [field.name for field in fields(Request) if field.name not in ("shots", "preprocess")]
    return Request(shots, preprocess=_preprocess(given), **{name: given.pop(name) for name in names if name in given})


def _preprocess(given: dict[str, Any]) -> Preprocess:
    single = {name: given.pop(name) for name in _PIXELS if name in given}
    whole = given.pop("preprocess", None)
    if whole is not None and single:
        raise JobError(f"preprocess and {' and '.join(single)} are both given.\n  Put them into Preprocess(...).")
    for name in single.keys() & {"mean", "std"}:
        single[name] = tuple(np.atleast_1d(single[name]).tolist())
    return whole if whole is not None else Preprocess(**single)


def _gate(given: dict[str, Any]) -> Gate:
    single = {name: given.pop(name) for name in _LIMITS if name in given}
    whole = given.pop("gate", None)
    if whole is not None and single:
        raise JobError(f"gate and {' and '.join(single)} are both given.\n  Put them into Gate(...).")
    if "warn_only" in single:
        names = single["warn_only"]
        several = (names,) if isinstance(names, str) else names
        single["warn_only"] = tuple(name.replace("-", "_") for name in several)
    return whole if whole is not None else Gate(**single)


def _job(work: Any, given: dict[str, Any], asked: Request, *, model: Path, out: Path) -> Job:
    """Return the job."""
    if given.get("round_to") == "auto":
        del given["round_to"]
    told = {name: value for name, value in asked.told().items() if value is not None}
    told |= {"shots": asked.names, "preprocess": asked.preprocess, "seed": asked.seed, "gate": _gate(given)}
    if not isinstance(asked.labels, (str, os.PathLike)):
        told.pop("labels", None)
    job: Job = work.Job(model=model, out=out, **told, **given)
    return job


def _library() -> Any:
    """Import the job, and torch with it."""
    try:
        import xdonnx.job
    except (ImportError, OSError, RuntimeError) as error:
        # A torch whose libraries are missing raises any of these.
        raise MachineError(f"torch does not import: {error}.\n  See what is wrong with it: xdonnx doctor") from error
    return xdonnx.job


def _on_disk(model: Model, place: Path) -> Path:
    """Return where a model lies; onnxruntime and the size that is gated are of files, so one in memory is written."""
    if not isinstance(model, onnx.ModelProto):
        return Path(model)
    write_proto(model, place)
    return place


def _call(name: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> str:
    """Return the call as a report says it; what is in memory by its kind."""
    told = [*map(_written, arguments), *(f"{key}={_written(value)}" for key, value in options.items())]
    return f"xdonnx.{name}({', '.join(told)})"


def _written(value: Any) -> str:
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if isinstance(value, (tuple, list)) and not any(hasattr(part, "__array__") for part in value):
        return f"[{', '.join(map(_written, value))}]"
    plain = (str, int, float, Gate, Preprocess, type(None))
    return repr(value) if isinstance(value, plain) else f"<{type(value).__name__}>"


def _without_paths(report: Report, scratch: str) -> Report:
    """Return the report without the paths of files that were there for a moment only."""

    def plain(file: FileInfo | None) -> FileInfo | None:
        return file.model_copy(update={"path": MEMORY}) if file and file.path.startswith(scratch) else file

    files = report.files.model_copy(
        update={"teacher": plain(report.files.teacher), "student": plain(report.files.student)}
    )
    job = {k: MEMORY if isinstance(v, str) and v.startswith(scratch) else v for k, v in report.job.items()}
    return report.model_copy(update={"files": files, "job": job})
