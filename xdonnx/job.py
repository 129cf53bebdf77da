"""The whole tool on one screen: a `Job` says what is wanted, `run` does it and returns the report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from xdonnx.accounting import layer_results
from xdonnx.agreement import check_same, keep_sparse
from xdonnx.allocation import Curve, allocate, measure_curves
from xdonnx.augment import VIEWS, widened
from xdonnx.budget import Plan, candidates, make_plan
from xdonnx.convert import Program, checked, convert
from xdonnx.devices import usable_device
from xdonnx.errors import ShotsError, VerifyError
from xdonnx.events import Event, Log, ignore, legible
from xdonnx.fidelity import compare, fixed_batch
from xdonnx.foreign import refitted
from xdonnx.gate import heavy_loss, of_a_job
from xdonnx.given import GivenStudent, check_matching, match_results, matched
from xdonnx.graph import Net, read_net
from xdonnx.methods.layerwise import Bench, Outcome
from xdonnx.model import Port, check_file, fingerprint, interface, read_proto, sized, write_proto
from xdonnx.patch import Patch, cut, masked
from xdonnx.paths import check_spared, check_student, rejected_path
from xdonnx.planfile import plan_of
from xdonnx.preprocessing import check_samples
from xdonnx.report import Fidelity, LayerResult, Report, tool
from xdonnx.runtime import open_session
from xdonnx.samples import apart, fraction
from xdonnx.shots import Shots, Unread
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
    given: GivenStudent | None = None


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
    started, warnings = datetime.now().astimezone(), []

    def note(event: Event) -> None:
        if event.level == "warning":
            warnings.append(event.text)
        log(event)

    methods = job.methods()
    ready = prepared(job, note, read=read)
    net, fit = ready.net, ready.fit
    program = opened(ready, note)
    plan = planned(job, ready, program, note)
    bench = Bench(program, torch.Generator().manual_seed(job.seed), note)
    if ready.given is not None:
        student, layers = refitted(methods, net, ready.given, fit, bench)
        _stamp(student, job, net)
        return _judge_and_write(job, ready, student, layers, tuple(warnings), started, command, log)
    outcome = Outcome(Patch())
    for method in methods:
        found = method(net, outcome.patch, fit, plan, bench)
        outcome = Outcome(found.patch, (*outcome.traces, *found.traces))
    note(Event("cut", "Cut the graph"))
    student = cut(net, outcome.patch)
    check_interface(net.source, student)
    first = chunked(net, fit.inputs, most=4)[0]
    check_same(masked(net, outcome.patch), student, first)
    if job.structure != "channel":
        keep_sparse(student, first, note)
    _stamp(student, job, net)
    layers = layer_results(net, outcome, job.structure, residual=job.residual or job.plan is not None)
    return _judge_and_write(job, ready, student, layers, tuple(warnings), started, command, log)


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


def planned(job: Job, ready: Prepared, program: Program, log: Log = ignore) -> Plan:
    """Return how many units stay where: the same fraction everywhere, or as error curves or a plan's file say."""
    if not job.measured():
        return ready.plan
    return allocate(ready.net, curves(job, ready, program, log), job.budget())


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
    if job.student is not None:
        check_file(job.student)
        check_spared(job.out, job.student, "--student")
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
    given = None
    if job.student is not None:
        files = (job.model, job.student)
        given, plan = matched(files, net, fit.inputs, sizes, by=job.match, log=log), Plan("channel")
        if job.match is None:
            check_matching(given, files)
    else:
        plan = plan_of(job.plan, net, fingerprint(job.model)) if job.plan else make_plan(net, budget)
    batch = fixed_batch(ports, fit) or 1
    for part, does in ((fit, "fit"), (held_out, "judge")):
        if len(part) < batch:
            raise ShotsError(
                f"the graph takes {batch} samples at once, and {len(part)} {does}.\n"
                "  Give more samples, or export the model with a free batch axis."
            )
    # All of them, not only those drawn: one label beyond the classes means that they are numbered otherwise.
    check_asked(session, fit, job.gate, [part.labels for part in (whole, held) if not isinstance(part, float)])
    return Prepared(net, fit, held_out, plan, device, given)


def _stamp(student: onnx.ModelProto, job: Job, net: Net) -> None:
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


def _judge_and_write(
    job: Job,
    ready: Prepared,
    student: onnx.ModelProto,
    layers: list[LayerResult],
    warnings: tuple[str, ...],
    started: datetime,
    command: str,
    log: Log,
) -> Report:
    with tempfile.TemporaryDirectory(dir=job.out.parent, prefix=f".{legible(job.out.name)}.") as folder:
        candidate = Path(folder) / job.out.name
        write_proto(student, candidate, external=job.external_data)
        heard: list[str] = []

        def note(event: Event) -> None:
            if event.level == "warning":
                heard.append(event.text)
            log(event)

        held_out = fraction(job.holdout) != 0.0
        how: dict[str, Any] = {"device": ready.device, "held_out": held_out, "log": note}
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
        report = verify(
            job.model,
            candidate,
            ready.held_out,
            of_a_job(job.gate, job.structure),
            seed=job.seed,
            command=command,
            job=job.model_dump(),
            fitted=ready.fit if held_out else None,
            shots_path=", ".join(job.shots) or "synthetic",
            known=fidelity,
            own_opset=ready.given is not None,
            **how,
        )
        if report.exit_code not in (0, 3):
            raise VerifyError("; ".join(report.reasons))
        out = job.out if report.exit_code == 0 else rejected_path(job.out)
        write_proto(student, out, external=job.external_data)
    written = file_facts(out)
    loss = heavy_loss(report.fidelity, [result.name for result in report.gates])
    return report.model_copy(
        update={
            "files": report.files.model_copy(update={"student": written}),
            "layers": tuple(layers),
            "matches": match_results(ready.given.matching, ready.net) if ready.given else (),
            "fit_samples": len(ready.fit),
            "warnings": tuple(dict.fromkeys((*loss, *warnings, *heard, *report.warnings))),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round((datetime.now().astimezone() - started).total_seconds(), 3),
        }
    )


def _worth(fidelity: Fidelity) -> dict[str, str]:
    worst = max((o.relative_l2 for o in fidelity.outputs if o.relative_l2 is not None), default=None)
    facts = {"held_out_agreement": fidelity.top1_agreement, "held_out_relative_l2": worst}
    return {key: f"{value:.6g}" for key, value in facts.items() if value is not None}
