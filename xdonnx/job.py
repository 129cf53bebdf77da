"""The whole tool on one screen: a `Job` says what is wanted, `run` does it and returns the report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from xdonnx.accounting import layer_results
from xdonnx.agreement import check_same, keep_sparse
from xdonnx.allocation import Curve, measure_curves
from xdonnx.augment import VIEWS, widened
from xdonnx.budget import MEASURED, Plan, candidates, floor, macs, pretend
from xdonnx.convert import Program, checked, convert
from xdonnx.devices import usable_device
from xdonnx.errors import NothingToDo, ShotsError, VerifyError
from xdonnx.events import Event, Log, ignore, legible
from xdonnx.fidelity import compare, fixed_batch
from xdonnx.gate import heavy_loss, of_a_job
from xdonnx.graph import Net, read_net
from xdonnx.methods.layerwise import Bench, Outcome
from xdonnx.model import Port, file_bytes, fingerprint, interface, read_proto, sized, write_proto
from xdonnx.patch import Patch, cut, masked
from xdonnx.paths import check_student, rejected_path
from xdonnx.planfile import plan_of
from xdonnx.preprocessing import check_samples
from xdonnx.report import Fidelity, LayerResult, Report, plain, tool
from xdonnx.runtime import open_session
from xdonnx.samples import apart, fraction
from xdonnx.shots import Shots, Unread
from xdonnx.sizing import Scales
from xdonnx.tables import stopwatch
from xdonnx.targets import Means, first_plan, limit_of, met
from xdonnx.tries import TRIES, Try, halve
from xdonnx.verification import check_asked, check_interface, file_facts, verify
from xdonnx.walk import affordable, chunked
from xdonnx.wanted import Job as Job

# Of the intervals in the report, where no gate asks for another.
CONFIDENCE = 0.95
# Gives all samples, and the fraction of them that is held out or those that are, for the inputs of a graph.
Reader = Callable[[Sequence[Port], Log], tuple[Shots | Unread, float | Shots]]


@dataclass(frozen=True)
class Prepared:
    """A job with everything read and checked, before any work: what `--dry-run` shows."""

    net: Net
    fit: Shots
    held_out: Shots
    plan: Plan
    device: str
    tries: tuple[Try, ...] = ()


@dataclass(frozen=True)
class Judged:
    """A student that is whole but not yet in place, and its report."""

    student: onnx.ModelProto
    report: Report


def run(job: Job, log: Log = ignore, *, command: str = "", read: Reader | None = None) -> Report:
    """Compress a model and say what it cost.

    Parameters
    ----------
    job : Job
    log : callable
        Told of progress and warnings.
    command : str
        What the user typed, for the report.
    read : callable, optional
        Gives the samples in place of the files that the job names.

    Returns
    -------
    Report
        Exit code 0: `job.out` is written. 3: a gate failed; the candidate lies beside it as `.rejected.onnx`.

    Raises
    ------
    XdonnxError
        Nothing was written.
    """
    started = datetime.now().astimezone()
    heard: list[str] = []
    note = _hearing(log, heard)
    job.methods()
    ready = prepared(job, note, read=read)
    program = opened(ready, note)
    if job.smallest:
        judged, tries = _smallest(job, ready, program, command, note)
    else:
        ready = planned(job, ready, program, note)
        judged, tries = _made(job, ready, program, command, note), ready.tries
    return _delivered(job, ready, judged, tries, heard, started)


def _made(job: Job, ready: Prepared, program: Program, command: str, log: Log) -> Judged:
    """Fit the student of a plan, cut it, and judge it."""
    heard: list[str] = []
    note = _hearing(log, heard)
    net, fit = ready.net, ready.fit
    bench = Bench(program, torch.Generator().manual_seed(job.seed), note)
    outcome = Outcome(Patch())
    for method in job.methods():
        found = method(net, outcome.patch, fit, ready.plan, bench)
        outcome = Outcome(found.patch, (*outcome.traces, *found.traces))
    note(Event("cut", "Cut the graph"))
    student = cut(net, outcome.patch)
    check_interface(net.source, student)
    first = chunked(net, fit.inputs, most=4)[0]
    check_same(masked(net, outcome.patch), student, first)
    if job.structure != "channel":
        keep_sparse(student, first, note)
    _stamp(student, job)
    layers = layer_results(net, outcome, job.structure, residual=job.residual or job.plan is not None)
    return _judged(job, ready, student, layers, heard, command, log)


def _smallest(job: Job, ready: Prepared, program: Program, command: str, log: Log) -> tuple[Judged, tuple[Try, ...]]:
    """Return the student of the smallest share that passes, and all that was tried; where none does, the mildest."""
    measured = curves(job, ready, program, log) if job.measured() else None
    whole = macs(ready.net, pretend(ready.net, {}))
    # Students are large: held are the smallest that passed, and of those that did not the one that keeps most.
    held: dict[bool, tuple[float, Judged]] = {}
    tries: dict[float, Try] = {}

    def plan(share: float) -> Plan:
        return _met(job.at(share), ready, measured, log)[0]

    def faithful(share: float, plan: Plan) -> bool:
        its = job.at(share)
        quiet: Log = lambda event: log(replace(event, level="info"))  # noqa: E731
        judged = _made(its, replace(ready, plan=plan), program, command, quiet)
        report = judged.report
        broken = {gate.name for gate in report.gates if gate.level == "fail" and not gate.passed}
        passed = report.exit_code == 0
        if passed not in held or (share < held[passed][0]) == passed:
            held[passed] = share, judged
        fidelity = report.fidelity
        tries[share] = Try(
            asked=f"{its.target().split()[1]} {100 * share:g}%",
            macs=macs(ready.net, pretend(ready.net, plan.channels)) / max(whole, 1),
            drop=fidelity.drop.value if fidelity and fidelity.drop else None,
            error=_worst_error(fidelity),
            passed=passed,
        )
        word = "passed" if passed else "failed"
        log(Event("smallest", f"{tries[share].asked}: {word}", done=len(tries), total=TRIES))
        # The other limits are kept by removing more.
        return not broken & {"max_drop", "max_error"}

    halve(plan, faithful, floor(ready.net, job.at(0.5).budget()))
    if not held:
        raise NothingToDo("no share of the network may go.\n  See what may: xdonnx inspect.")
    share, judged = held[True] if True in held else held[False]
    tries[share] = tries[share].model_copy(update={"chosen": True})
    return judged, tuple(tries.values())


def opened(ready: Prepared, log: Log = ignore) -> Program:
    """Return the teacher in torch, every step checked against onnxruntime."""
    # Rounded products would fail the comparison with onnxruntime, and one seed is to give one student.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    program = convert(ready.net, torch.device(ready.device))
    return checked(ready.net, program, chunked(ready.net, ready.fit.inputs, most=4)[0], log)


def curves(job: Job, ready: Prepared, program: Program, log: Log = ignore) -> tuple[Curve, ...]:
    """Return the error curves of the groups that may lose channels, measured on the samples that fit."""
    inputs = widened(ready.fit.inputs, affordable(ready.net, VIEWS), torch.Generator().manual_seed(job.seed))
    return measure_curves(ready.net, program, inputs, candidates(ready.net, job.budget()), log)


def planned(
    job: Job, ready: Prepared, program: Program, log: Log = ignore, measured: Sequence[Curve] | None = None
) -> Prepared:
    """Return the job with how many units stay where, and what was tried to find that.

    Parameters
    ----------
    job : Job
        With `smallest` the first of its tries.
    ready : Prepared
    program : Program
    log : callable
    measured : sequence of Curve, optional
        The error curves, where they are known already and the job splits by them.

    Raises
    ------
    NothingToDo
        The target is out of reach.
    """
    if job.smallest:
        job = job.at((1 + floor(ready.net, job.at(0.5).budget())) / 2)
    elif not job.measured() and job.budget().kind not in MEASURED:
        return ready
    if job.measured() and measured is None:
        measured = curves(job, ready, program, log)
    plan, tries = _met(job, ready, measured if job.measured() else None, log)
    return replace(ready, plan=plan, tries=tries)


def _met(job: Job, ready: Prepared, measured: Sequence[Curve] | None, log: Log) -> tuple[Plan, tuple[Try, ...]]:
    net, inputs = ready.net, ready.fit.inputs

    def stamp(student: onnx.ModelProto) -> None:
        _stamp(student, job)
        _add_metadata(student, dict.fromkeys(_WORTH, "-1.23457e-100"))  # as long as any

    scales = Scales(net, chunked(net, inputs, most=4)[0], stamp, job.out.name, job.external_data)
    means = Means(job.model, chunked(net, inputs, most=1)[0], stopwatch(ready.device), scales)
    return met(net, job.budget(), measured, means, log)


def prepared(job: Job, log: Log = ignore, *, writes: bool = True, read: Reader | None = None) -> Prepared:
    """Read and check everything that a job names, so that mistakes show before any work.

    Parameters
    ----------
    job : Job
    log : callable
    writes : bool
        Whether OUT will be written, and so has to be free.
    read : callable, optional
        Gives the samples in place of the files that the job names.

    Raises
    ------
    XdonnxError
        Of the kind whose exit code fits.
    """
    budget = job.budget()
    methods = job.methods()
    job.measured()
    if writes:
        check_student(job.out, job.model, force=job.force, external=job.external_data)
    device = usable_device(job.device)
    log(Event("read", f"Read {job.model.name}"))
    proto = read_proto(job.model)
    session = open_session(job.model)
    ports = sized(interface(proto).inputs, job.input_shape)
    asked = job.asked()
    whole, held = (read or asked.read)(ports, log)
    fit, held_out = apart(whole, held, asked, log=log)
    if isinstance(whole, Unread):
        check_samples(proto, session, ports, whole, job.preprocess, log)
    for method in methods:
        if getattr(method, "labelled", False) and fit.labels is None:
            raise ShotsError(
                "a method of this job learns from labels, and the samples have none.\n"
                "  Pass --labels FILE, or folders named by class; --method cross --method tune needs no labels."
            )
    sizes = {**{name: array.shape for name, array in fit.inputs.items()}, **job.input_shape}
    net = read_net(proto, sizes)
    plan = plan_of(job.plan, net, fingerprint(job.model)) if job.plan else first_plan(net, budget)
    batch = fixed_batch(ports, fit) or 1
    for part, does in ((fit, "fit"), (held_out, "judge")):
        if len(part) < batch:
            raise ShotsError(
                f"the graph takes {batch} samples at once, and {len(part)} {does}.\n"
                "  Give more samples, or export the model with a free batch axis."
            )
    # All of them, not only those drawn: one label beyond the classes means that they are numbered otherwise.
    check_asked(session, fit, job.gate, [part.labels for part in (whole, held) if not isinstance(part, float)])
    return Prepared(net, fit, held_out, plan, device)


def _hearing(log: Log, heard: list[str]) -> Log:
    """Pass events on, and keep the text of those that warn."""

    def note(event: Event) -> None:
        if event.level == "warning":
            heard.append(event.text)
        log(event)

    return note


def _stamp(student: onnx.ModelProto, job: Job) -> None:
    """Write into the model where it comes from."""
    facts = {
        "version": tool().version,
        "teacher_sha256": fingerprint(job.model),
        "method": "+".join(job.method),
        "target": job.target(),
    }
    _add_metadata(student, facts)


def _add_metadata(student: onnx.ModelProto, facts: Mapping[str, str]) -> None:
    names = {f"xdonnx.{key}" for key in facts}
    others = [entry for entry in student.metadata_props if entry.key not in names]
    del student.metadata_props[:]
    student.metadata_props.extend(others)
    for key, value in facts.items():
        student.metadata_props.add(key=f"xdonnx.{key}", value=value)


def _judged(
    job: Job,
    ready: Prepared,
    student: onnx.ModelProto,
    layers: list[LayerResult],
    heard: list[str],
    command: str,
    log: Log,
) -> Judged:
    """Write the student beside where it will lie, and compare that file with the teacher's."""
    with tempfile.TemporaryDirectory(dir=job.out.parent, prefix=f".{legible(job.out.name)}.") as folder:
        candidate = Path(folder) / job.out.name
        write_proto(student, candidate, external=job.external_data)
        held_out = fraction(job.holdout) != 0.0
        how: dict[str, Any] = {"device": ready.device, "held_out": held_out, "log": _hearing(log, heard)}
        fidelity = compare(
            job.model,
            candidate,
            ready.held_out,
            generator=np.random.default_rng(job.seed),
            confidence=job.gate.confidence or CONFIDENCE,
            **how,
        )
        # Stamped with what it was found to be worth, so that the file judged is to the byte the file delivered.
        _add_metadata(student, _worth(fidelity))
        write_proto(student, candidate, external=job.external_data)
        budget = job.budget()
        if budget.kind == "size" and file_bytes(candidate) > limit_of(budget, job.model):
            raise VerifyError(
                f"the student has {file_bytes(candidate):,} bytes, more than --size {budget.told}.\n"
                "  This is a defect of xdonnx: please report it with the model's operators (xdonnx inspect)."
            )
        report = verify(
            job.model,
            candidate,
            ready.held_out,
            of_a_job(job.gate, job.structure),
            seed=job.seed,
            command=command,
            fitted=ready.fit if held_out else None,
            shots_path=", ".join(job.shots) or "synthetic",
            known=fidelity,
            **how,
        )
        if report.exit_code not in (0, 3):
            raise VerifyError("; ".join(report.reasons))
    warnings = (*heard, *report.warnings)
    return Judged(student, report.model_copy(update={"layers": tuple(layers), "warnings": warnings}))


def _delivered(
    job: Job, ready: Prepared, judged: Judged, tries: Sequence[Try], heard: Sequence[str], started: datetime
) -> Report:
    """Put the student in place, or beside it where it failed, and return the whole report."""
    report = judged.report
    out = job.out if report.exit_code == 0 else rejected_path(job.out)
    write_proto(judged.student, out, external=job.external_data)
    loss = heavy_loss(report.fidelity, [result.name for result in report.gates])
    return report.model_copy(
        update={
            "files": report.files.model_copy(update={"student": file_facts(out)}),
            "job": plain(job.model_dump()),
            "tries": tuple(tries),
            "fit_samples": len(ready.fit),
            "warnings": tuple(dict.fromkeys((*loss, *heard, *report.warnings))),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round((datetime.now().astimezone() - started).total_seconds(), 3),
        }
    )


# What a file says of its own worth.
_WORTH = ("held_out_agreement", "held_out_relative_l2")


def _worth(fidelity: Fidelity) -> dict[str, str]:
    facts = zip(_WORTH, (fidelity.top1_agreement, _worst_error(fidelity)), strict=True)
    return {key: f"{value:.6g}" for key, value in facts if value is not None}


def _worst_error(fidelity: Fidelity | None) -> float | None:
    outputs = fidelity.outputs if fidelity else ()
    return max((output.relative_l2 for output in outputs if output.relative_l2 is not None), default=None)
