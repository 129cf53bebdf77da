"""The whole tool on one screen: a `Job` says what is wanted, `run` does it and returns the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from xdonnx.collection import Teacher, collect
from xdonnx.convert import Program, checked, convert
from xdonnx.delivery import WORTH, Judged, delivered, judged, stamp, worst_error
from xdonnx.devices import usable_device
from xdonnx.errors import NothingToDo, ShotsError
from xdonnx.events import Event, Log, hearing, ignore
from xdonnx.fidelity import fixed_batch
from xdonnx.foreign import refitted
from xdonnx.given import GivenStudent, check_matching, match_results, matched, nonzero, size
from xdonnx.graph import Net, read_net
from xdonnx.journal import Journal, open_journal
from xdonnx.machine import machines_fault
from xdonnx.methods.bench import Bench, Outcome
from xdonnx.methods.training import set_apart
from xdonnx.model import add_metadata, check_file, interface, model_fingerprint, read_proto, sized
from xdonnx.patch import Patch, cut, masked
from xdonnx.paths import check_spared, check_student, partial_folder
from xdonnx.planfile import plan_of
from xdonnx.pool import Pool
from xdonnx.preprocessing import check_samples
from xdonnx.report import LayerResult, Memory, Report
from xdonnx.resuming import identity, keeping, recalled_curves, recalled_plan, staged
from xdonnx.room import allowance
from xdonnx.runtime import open_session
from xdonnx.samples import Request, apart
from xdonnx.sheet import PoolSheet
from xdonnx.shelf import Room
from xdonnx.shots import Shots, Unread
from xdonnx.sizing import Scales
from xdonnx.tables import stopwatch
from xdonnx.targets import Means, first_plan, met
from xdonnx.tries import FINEST, TRIES, Try, halve
from xdonnx.verification import check_asked, check_interface
from xdonnx.walk import affordable, at_once, chunked
from xdonnx.wanted import Job as Job


@dataclass(frozen=True)
class Prepared:
    """A job with everything read and checked, before any work: what `--dry-run` shows."""

    net: Net
    fit: Shots
    held_out: Shots
    plan: Plan
    device: str
    pool: Shots | Unread | None = None
    tries: tuple[Try, ...] = ()
    given: GivenStudent | None = None


@dataclass(frozen=True)
class Workshop:
    """What the work on a job needs besides what was read: see `Bench`."""

    program: Program
    room: Room
    journal: Journal
    pool: Pool | None
    command: str


def run(job: Job, log: Log = ignore, *, command: str = "", asked: Request | None = None) -> Report:
    """Compress a model and say what it cost.

    Parameters
    ----------
    job : Job
    log : callable
        Told of progress and warnings.
    command : str
        What the user typed, for the report.
    asked : Request, optional
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
    note = hearing(log, heard)
    try:
        ready = prepared(job, note, asked=asked)
        known = identity(job, ready.fit, ready.held_out, ready.pool, ready.device)
        journal = open_journal(partial_folder(job.out), known, note, resume=job.resume)
        with keeping(journal):
            allowed = allowance(ready.net, ready.fit.inputs, ready.device, job.memory, note)
            pool, sheet = pooled(job, ready, note)
            shop = Workshop(opened(ready, note), allowed.room, journal, pool, command)
            judged, tries = _smallest(job, ready, shop, note) if job.smallest else _aimed(job, ready, shop, note)
            report = delivered(job, len(ready.fit), judged, tries, heard, started)
            matches = match_results(ready.given.matching, ready.net) if ready.given else ()
            used = Memory(limit=allowed.limit, peak=allowed.peak(), spilled=allowed.room.spilled)
            return report.model_copy(update={"memory": used, "pool": sheet, "matches": matches})
    except (MemoryError, RuntimeError, OSError) as error:
        fault = machines_fault(error)
        if fault is None:
            raise
        for line in getattr(error, "__notes__", ()):
            fault.add_note(line)
        raise fault from error


def _aimed(job: Job, ready: Prepared, shop: Workshop, log: Log) -> tuple[Judged, tuple[Try, ...]]:
    """Return the student that meets the target, and what was tried to find its plan."""

    def planning() -> tuple[Plan, tuple[Try, ...]]:
        found = planned(job, ready, shop.program, log, _curves(job, ready, shop, log))
        return found.plan, found.tries

    # Of a plan that rests on measured times a second measurement would make another.
    plan, tries = recalled_plan(shop.journal, planning)
    return _made(job, replace(ready, plan=plan, tries=tries), shop, log), tries


def _curves(job: Job, ready: Prepared, shop: Workshop, log: Log) -> tuple[Curve, ...] | None:
    if not job.measured():
        return None
    return recalled_curves(shop.journal, lambda: curves(job, ready, shop.program, log, shop.room))


def _made(job: Job, ready: Prepared, shop: Workshop, log: Log) -> Judged:
    """Fit the student of a plan, cut it, and judge it."""
    heard: list[str] = []
    note = hearing(log, heard)
    net, fit = ready.net, ready.fit
    bench = Bench(shop.program, torch.Generator().manual_seed(job.seed), note, shop.room, pool=shop.pool)
    if ready.given is not None:
        if job.memory is not None:
            text = "--memory holds for what is removed here; a given --student is refitted with all values in memory."
            note(Event("fit", text, level="warning"))
        student, layers = refitted(job.methods(), net, ready.given, fit, bench)
        stamp(student, job)
        return _judged(job, ready, student, layers, heard, shop.command, log)
    outcome = _chained(job, ready, bench, shop.journal)
    note(Event("cut", "Cut the graph"))
    student = cut(net, outcome.patch)
    check_interface(net.source, student)
    first = chunked(net, fit.inputs, most=4)[0]
    check_same(masked(net, outcome.patch), student, first)
    if job.structure != "channel":
        keep_sparse(student, first, note)
    stamp(student, job)
    layers = layer_results(net, outcome, job.structure, residual=job.residual or job.plan is not None)
    return _judged(job, ready, student, layers, heard, shop.command, log)


def _chained(job: Job, ready: Prepared, bench: Bench, journal: Journal) -> Outcome:
    """Let the methods of a job follow each other."""
    net, fit, methods = ready.net, ready.fit, job.methods()
    trained = [method for method in methods if getattr(method, "follows", False)]
    judges = set_apart(len(fit), net.batch, job.seed) if trained else ()

    def chain(methods: Sequence[Any], others: Shots, bench: Bench, journal: Journal) -> tuple[Outcome, bool]:
        """Return what comes of some methods, those that do not train on `others`, and whether training gained."""
        outcome, gained = Outcome(Patch()), False
        for at, method in enumerate(methods):
            trains = method in trained
            seen, own = (fit, replace(bench, judges=judges)) if trains else (others, bench)
            found = staged(at, method, net, outcome.patch, seen, ready.plan, own, journal)
            gained = gained or (trains and not found.patch.same(outcome.patch))
            outcome = Outcome(found.patch, (*outcome.traces, *found.traces))
        return outcome, gained

    others = fit.take(np.setdiff1d(np.arange(len(fit)), judges)) if judges else fit
    outcome, gained = chain(methods, others, bench, journal)
    if not judges or gained:
        return outcome
    # Judges were spared for a training that brought nothing: without it, all samples may fit.
    bench.log(Event("fit", "Fit the layers again, on all samples"))
    again = replace(bench, generator=torch.Generator().manual_seed(job.seed))
    return chain([method for method in methods if method not in trained], fit, again, journal.under("all"))[0]


def _judged(
    job: Job,
    ready: Prepared,
    student: onnx.ModelProto,
    layers: list[LayerResult],
    heard: list[str],
    command: str,
    log: Log,
) -> Judged:
    parts = (ready.fit, ready.held_out)
    return judged(job, parts, ready.device, student, layers, heard, command, log, own_opset=ready.given is not None)


def _smallest(job: Job, ready: Prepared, shop: Workshop, log: Log) -> tuple[Judged, tuple[Try, ...]]:
    """Return the student of the smallest share that passes, and all that was tried; where none does, the mildest."""
    measured = _curves(job, ready, shop, log)
    whole = macs(ready.net, pretend(ready.net, {}))
    # Students are large: held are the smallest that passed, and of those that did not the one that keeps most.
    held: dict[bool, tuple[float, Judged]] = {}
    tries: dict[float, Try] = {}

    def plan(share: float) -> Plan:
        return _met(job.at(share), ready, measured, log)[0]

    def faithful(share: float, plan: Plan) -> bool:
        its = job.at(share)
        quiet: Log = lambda event: log(replace(event, level="info"))  # noqa: E731
        own = replace(shop, journal=shop.journal.under(f"{share:g}"))
        found = _made(its, replace(ready, plan=plan), own, quiet)
        report = found.report
        broken = {gate.name for gate in report.gates if gate.level == "fail" and not gate.passed}
        passed = report.exit_code == 0
        if passed not in held or (share < held[passed][0]) == passed:
            held[passed] = share, found
        fidelity = report.fidelity
        tries[share] = Try(
            asked=f"{its.target().split()[1]} {100 * share:g}%",
            macs=macs(ready.net, pretend(ready.net, plan.channels)) / max(whole, 1),
            drop=fidelity.drop.value if fidelity and fidelity.drop else None,
            error=worst_error(fidelity),
            passed=passed,
        )
        word = "passed" if passed else "failed"
        log(Event("smallest", f"{tries[share].asked}: {word}", done=len(tries), total=max(TRIES, len(tries))))
        # The other limits are kept by removing more.
        return not broken & {"max_drop", "max_error"}

    least = floor(ready.net, job.at(0.5).budget())
    halve(plan, faithful, least)
    if tries and all(one.passed for one in tries.values()) and min(tries) > least + FINEST:
        text = f"every share that was tried passed: less may pass too, down to the {least:.1%} that cannot go."
        log(Event("smallest", text, level="warning"))
    if not held:
        raise NothingToDo("no share of the network may go.\n  See what may: xdonnx inspect.")
    share, chosen = held[True] if True in held else held[False]
    tries[share] = tries[share].model_copy(update={"chosen": True})
    return chosen, tuple(tries.values())


def pooled(job: Job, ready: Prepared, log: Log = ignore) -> tuple[Pool, PoolSheet] | tuple[None, None]:
    """Return the pool of a job, scored, and what the report says of it; nothing where the job has none."""
    if ready.pool is None:
        return None, None
    teacher = Teacher(job.model, ready.net.source, ready.device)
    most = at_once(ready.net)
    return collect(ready.pool, teacher, ready.fit, ready.held_out, how=job.pool_draw, most=most, log=log)


def opened(ready: Prepared, log: Log = ignore) -> Program:
    """Return the teacher in torch, every step checked against onnxruntime."""
    # Rounded products would fail the comparison with onnxruntime, and one seed is to give one student.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    program = convert(ready.net, torch.device(ready.device))
    return checked(ready.net, program, chunked(ready.net, ready.fit.inputs, most=4)[0], log)


def curves(
    job: Job, ready: Prepared, program: Program, log: Log = ignore, room: Room | None = None
) -> tuple[Curve, ...]:
    """Return the error curves of the groups that may lose channels, measured on the samples that fit."""
    inputs = widened(ready.fit.inputs, affordable(ready.net, VIEWS), torch.Generator().manual_seed(job.seed))
    return measure_curves(ready.net, program, inputs, candidates(ready.net, job.budget()), log, room)


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

    def stamped(student: onnx.ModelProto) -> None:
        stamp(student, job)
        add_metadata(student, dict.fromkeys(WORTH, "-1.23457e-100"))  # as long as any

    scales = Scales(net, chunked(net, inputs, most=4)[0], stamped, job.out.name, job.external_data)
    means = Means(job.model, chunked(net, inputs, most=1)[0], stopwatch(ready.device), scales)
    return met(net, job.budget(), measured, means, log)


def prepared(job: Job, log: Log = ignore, *, writes: bool = True, asked: Request | None = None) -> Prepared:
    """Read and check everything that a job names, so that mistakes show before any work.

    Parameters
    ----------
    job : Job
    log : callable
    writes : bool
        Whether OUT will be written, and so has to be free.
    asked : Request, optional
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
    asked = asked or job.asked()
    whole, held = asked.read(ports, log)
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
    pool = asked.read_pool(sized(ports, {name: array.shape for name, array in fit.inputs.items()}), log)
    net = read_net(proto, sizes)
    given = None if job.student is None else _given(job, job.student, net, fit, sizes, log)
    if given is not None:
        plan = Plan("channel")
    else:
        plan = plan_of(job.plan, net, model_fingerprint(job.model)) if job.plan else first_plan(net, budget)
    batch = fixed_batch(ports, fit) or 1
    for part, does in ((fit, "fit"), (held_out, "judge")):
        if len(part) < batch:
            raise ShotsError(
                f"the graph takes {batch} samples at once, and {len(part)} {does}.\n"
                "  Give more samples, or export the model with a free batch axis."
            )
    # All of them, not only those drawn: one label beyond the classes means that they are numbered otherwise.
    check_asked(session, fit, job.gate, [part.labels for part in (whole, held) if not isinstance(part, float)])
    return Prepared(net, fit, held_out, plan, device, pool, given=given)


def _given(job: Job, student: Path, net: Net, fit: Shots, sizes: Mapping[str, Sequence[int]], log: Log) -> GivenStudent:
    """Return a given student, matched; raises where it is the teacher, another's, or lacks nothing."""
    files = (job.model, student)
    given = matched(files, net, fit.inputs, sizes, by=job.match, log=log)
    if model_fingerprint(student) == model_fingerprint(job.model):
        raise NothingToDo(f"'{student}' is the teacher: nothing was removed from it.\n  Name a smaller file.")
    if job.match is None:
        check_matching(given, net, files)
        if size(given.net) >= size(net) and nonzero(given.net) >= nonzero(net):
            raise NothingToDo(
                f"'{student}' has no fewer weights than the teacher, and no fewer that are not zero.\n"
                "  Name a student that lacks some. If it is one all the same, pass its matching: --match."
            )
    return given
