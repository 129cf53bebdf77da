"""Judge two ONNX files side by side in onnxruntime: interface, answers, cost and speed, in one report."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort

from xdonnx.cost import measure_cost
from xdonnx.errors import ShotsError, VerifyError
from xdonnx.events import Event, Log, hearing, ignore, legible
from xdonnx.fidelity import Array, Samples, check_classes, compare, fixed_batch, kinds
from xdonnx.gate import Gate, check_measurable, judge, verdict
from xdonnx.intervals import FEW, ratio_band
from xdonnx.limits import heavy_loss
from xdonnx.model import Interface, differences, file_bytes, fingerprint, interface, read_proto
from xdonnx.report import Fidelity, Figures, FileInfo, Files, InterfaceCheck, Latency, LatencyRatio, Report, plain, tool
from xdonnx.runtime import answer, open_session

# However slow a model is, so many runs of it are timed after the warm-up: fewer say nothing of the noise.
_FEWEST_RUNS = 7
# Samples that fitted which are looked at again, at most, to see what the student learned by heart.
_FITTED = 64
# A warning is due where new samples are surely answered so many times worse than those that fitted, and by more than
# such a relative error: least squares on few samples always fits those somewhat better, and often does no harm.
_OVERFIT, _HARMLESS = 3.0, 0.05
# Where no limit says how fine the answer has to be, samples that cannot tell a drop of so many points are too few.
_COARSE = 5.0


@dataclass(frozen=True, eq=False)
class _Unlabelled:
    """Samples without their classes."""

    inputs: Mapping[str, Array]
    labels: None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


def verify(
    teacher: str | Path,
    student: str | Path,
    shots: Samples,
    gate: Gate,
    *,
    device: str = "cpu",
    seed: int = 0,
    command: str = "",
    job: Mapping[str, Any] | None = None,
    confidence: float = 0.95,
    held_out: bool = True,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    shots_path: str = "",
    threads: int = 0,
    seconds: float = 1.0,
    known: Fidelity | None = None,
    fitted: Samples | None = None,
    own_opset: bool = False,
    log: Log = ignore,
) -> Report:
    """Compare two ONNX files in every respect and judge the second.

    Parameters
    ----------
    device, seed, threads, seconds
        Where both run, what draws the bootstrap, and of the latency; no seconds, no latency.
    command, job, shots_path
        What was typed, what it came to and where the samples lie: for the report only.
    confidence, held_out
        Of the intervals where the gate sets none; whether the student was fitted without these samples.
    known : Fidelity, optional
        What `compare` found on these samples and weights, so that it is not measured again.
    fitted : Samples, optional
        Those that fitted the student, to see whether it learned them by heart.
    own_opset : bool, default=False
        Whether the student may have another opset than the teacher, as one that another tool exported.
    shapes : dict of str to tuple of int, optional
        Inputs that MACs are counted for; by default of one sample, or of the graph's own batch.

    Returns
    -------
    Report
        Of exit code 0: passed; 3: a gate failed; 6: the interface differs or the student's answers are no numbers.

    Raises
    ------
    ModelError, ShotsError, MachineError, JobError
        A file cannot be read or run; the samples do not fit; the gate asks for what cannot be measured.
    """
    clock, warnings = time.perf_counter(), list[str]()
    log = hearing(log, warnings)
    protos = read_proto(teacher), read_proto(student)
    facts = _facts([teacher, student], shots, shots_path, command=command, job=job, seed=seed, device=device)
    check, reasons = _compare_interfaces(interface(protos[0]), interface(protos[1]), own_opset=own_opset)
    feed = _one_run(protos[0], shots)
    costs = _costs([teacher, student], protos, shapes or _shapes(feed), check, log)
    fidelity, gates = None, []  # of a student with another interface no answer is asked
    if check.inputs == "same" and check.outputs == "same":
        confidence = gate.confidence or confidence
        if known is None:
            check_asked(teacher, shots, gate)
        how: dict[str, Any] = {"device": device, "confidence": confidence, "held_out": held_out, "log": log}
        fidelity, wrong = (known, []) if known else _answers(teacher, student, shots, seed, **how)
        reasons += wrong
        if fidelity is not None and fitted is not None:
            own = _fit_error(teacher, student, fitted, device)
            fidelity = fidelity.model_copy(update={"fit_error": own})
        costs = _timed([teacher, student], costs, feed, device, threads=threads, seconds=seconds, log=log)
    if fidelity is not None:
        gates = judge(costs[0], costs[1], fidelity, gate)
        classes = 0 if shots.labels is None else len(np.unique(shots.labels))
        _caution(fidelity, gate, confidence, classes, log)
    outcome = verdict(gates, fidelity, gate.confidence) | (
        {"status": "failed", "exit_code": 6, "reasons": reasons} if reasons else {}
    )
    return Report(
        **facts,
        **outcome,
        seconds=round(time.perf_counter() - clock, 3),
        teacher=costs[0],
        student=costs[1],
        fidelity=fidelity,
        gates=tuple(gates),
        interface=check,
        warnings=tuple(dict.fromkeys((*heavy_loss(fidelity, gates), *warnings))),
    )


def check_asked(
    teacher: str | Path | ort.InferenceSession, shots: Samples, gate: Gate, labels: Sequence[Array | None] = ()
) -> None:
    """Make sure that what the gate asks can be measured of this model, and that labels are classes of it.

    Parameters
    ----------
    teacher : path or InferenceSession
        It is run on a few of the samples.
    shots : Samples
    gate : Gate
    labels : sequence of (n,) int64, optional
        Of samples besides.

    Raises
    ------
    JobError
        A limit is set on what no answer of this model shows.
    ShotsError
        A label is none of the model's classes.
    ModelError, MachineError
        The model cannot be run.
    """
    found = kinds(open_session(teacher) if isinstance(teacher, (str, Path)) else teacher, shots)
    check_measurable(gate, classifies=found.classes is not None, floating=found.floating, odd=found.odd)
    for numbers in (shots.labels, *labels):
        if numbers is not None and found.classes is not None:
            check_classes(np.asarray(numbers), found.classes)


def check_interface(teacher: onnx.ModelProto, student: onnx.ModelProto) -> None:
    """Make sure that callers of the teacher can call the student.

    Raises
    ------
    VerifyError
        Inputs, outputs, opset or metadata differ; each difference has a line.
    """
    found = differences(interface(teacher), interface(student))
    if found:
        raise VerifyError("the student's interface is not the teacher's:\n  " + "\n  ".join(found))


def latency(
    models: Sequence[str | Path | onnx.ModelProto],
    feeds: Sequence[Mapping[str, Array]],
    *,
    device: str = "cpu",
    threads: int = 0,
    repeats: int = 200,
    seconds: float = 2.0,
    log: Log = ignore,
) -> list[Latency]:
    """Time the models in turns, A B A B ..., so that whatever else the machine does hits all alike.

    Parameters
    ----------
    models : sequence of path or ModelProto
    feeds : sequence of dict
        What each model is fed, run after run.
    device : str, default='cpu'
    threads : int, default=0
        Within an operator; 0 lets onnxruntime choose.
    repeats : int, default=200
        Runs of each at most.
    seconds : float, default=2.0
        Ends the measurement early, though not before three runs of each. A tenth of it is warm-up.
    log : Log
        Told of progress in the stage 'latency'.

    Returns
    -------
    list of Latency
        Of each model, with the provider that really ran it.
    """
    times, ran = turns(models, feeds, device=device, threads=threads, repeats=repeats, seconds=seconds, log=log)
    quartiles = np.percentile(times, (25, 50, 75), axis=0).T
    return [
        Latency(
            q1=float(q1),
            median=float(median),
            q3=float(q3),
            provider=provider,
            threads=threads,
            runs=len(times),
            batch=max(len(values) for values in feed.values()),
            ratio=_ratio(times, at) if at else None,
        )
        for at, ((q1, median, q3), provider, feed) in enumerate(zip(quartiles, ran, feeds, strict=True))
    ]


def _ratio(times: Array, at: int) -> LatencyRatio:
    band = ratio_band(times[:, 0], times[:, at])
    return LatencyRatio(value=band.value, low=band.low, high=band.high, confidence=band.confidence)


def turns(
    models: Sequence[str | Path | onnx.ModelProto],
    feeds: Sequence[Mapping[str, Array]],
    *,
    device: str = "cpu",
    threads: int = 0,
    repeats: int = 200,
    seconds: float = 2.0,
    warm_up: float | None = None,
    timer: Callable[[], float] = time.perf_counter,
    log: Log = ignore,
) -> tuple[Array, list[str]]:
    """Return the milliseconds of every run, (runs, models), and the provider of each model.

    Parameters are those of :func:`latency`; `warm_up` is in seconds, by default a tenth of `seconds`, and so is what
    `timer` tells, by default the time of the day.
    """
    sessions = [open_session(model, device=device, threads=threads, spin=False) for model in models]
    pairs = list(zip(sessions, feeds, strict=True))
    clock = time.perf_counter()
    for _ in range(repeats):
        for session, feed in pairs:
            answer(session, feed)
        if time.perf_counter() - clock > (seconds / 10 if warm_up is None else warm_up):
            break
    times: list[list[float]] = []
    clock = time.perf_counter()
    while len(times) < repeats and (len(times) < _FEWEST_RUNS or time.perf_counter() - clock < seconds):
        turn = []
        for session, feed in pairs:
            start = timer()
            session.run(None, feed)
            turn.append(1000 * (timer() - start))
        times.append(turn)
        log(Event("latency", done=len(times), total=repeats))
    return np.array(times), [session.get_providers()[0] for session in sessions]


def _facts(
    paths: Sequence[str | Path],
    shots: Samples,
    shots_path: str,
    *,
    job: Mapping[str, Any] | None,
    **asked: str | int,
) -> dict[str, Any]:
    """Return what the report holds that needs no measurement."""
    teacher, student = (file_facts(path) for path in paths)
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "tool": tool(),
        "job": plain(job or {}),
        "files": Files(teacher=teacher, student=student, shots=shots_facts(shots, legible(shots_path))),
        **{name: legible(value) if isinstance(value, str) else value for name, value in asked.items()},
    }


def _compare_interfaces(
    teacher: Interface, student: Interface, *, own_opset: bool = False
) -> tuple[InterfaceCheck, list[str]]:
    """Return the differences by section, and all of them in a row."""

    def section(*names: str) -> Literal["same"] | tuple[str, ...]:
        # Only these fields are taken from the student; all others agree with the teacher by construction.
        other = replace(teacher, **{name: getattr(student, name) for name in names})
        return tuple(differences(teacher, other)) or "same"

    check = InterfaceCheck(
        inputs=section("inputs"),
        outputs=section("outputs"),
        opset=section("opset"),
        metadata=section("metadata", "doc"),
    )
    return check, differences(teacher, replace(student, opset=teacher.opset) if own_opset else student)


def _one_run(teacher: onnx.ModelProto, shots: Samples) -> dict[str, Array]:
    """Return the feed of one run: one sample, or a batch where the graph fixes it."""
    run = fixed_batch(interface(teacher).inputs, shots) or 1
    return {name: values[:run] for name, values in shots.inputs.items()}


def _answers(
    teacher: str | Path, student: str | Path, shots: Samples, seed: int, **how: Any
) -> tuple[Fidelity | None, list[str]]:
    """Compare the answers; where they cannot be compared, say why."""
    try:
        return compare(teacher, student, shots, generator=np.random.default_rng(seed), **how), []
    except VerifyError as error:
        return None, [str(error)]


def _fit_error(teacher: str | Path, student: str | Path, fitted: Samples, device: str) -> float | None:
    """Return the relative L2 of the worst output on some of the samples that fitted, spread over all of them."""
    step = max(1, len(fitted) // _FITTED)
    some = _Unlabelled({name: values[::step] for name, values in fitted.inputs.items()})
    try:
        found = compare(teacher, student, some, generator=np.random.default_rng(0), device=device)
    except (ShotsError, VerifyError):  # too few for a batch; no numbers: the judging samples have told already
        return None
    return max((output.relative_l2 for output in found.outputs if output.relative_l2 is not None), default=None)


def _shapes(feed: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: values.shape for name, values in feed.items()}


def _costs(
    paths: Sequence[str | Path],
    protos: Sequence[onnx.ModelProto],
    shapes: Mapping[str, tuple[int, ...]],
    check: InterfaceCheck,
    log: Log,
) -> list[Figures]:
    """Measure both files; a student of other inputs by its own shapes."""
    found = []
    for path, proto, whose in zip(paths, protos, ("teacher", "student"), strict=True):
        own = shapes if whose == "teacher" or check.inputs == "same" else None
        cost = measure_cost(proto, own)
        if cost.unknown:
            some = ", ".join(f"'{name}'" for name in cost.unknown[:3])
            text = f"MACs of the {whose} leave out {len(cost.unknown)} nodes of unknown shape: {some}"
            log(Event("verify", text, level="warning"))
        if onnx.load(path, load_external_data=False).graph.sparse_initializer:
            text = (
                f"the {whose} has sparse initializers, which onnxruntime makes dense on loading: "
                "the file is smaller, not the latency"
            )
            log(Event("verify", text, level="warning"))
        found.append(Figures(bytes=file_bytes(path), params=cost.params, nonzero=cost.nonzero, macs=cost.macs))
    return found


def _timed(
    paths: Sequence[str | Path],
    costs: Sequence[Figures],
    feed: Mapping[str, Array],
    device: str,
    *,
    threads: int,
    seconds: float,
    log: Log,
) -> list[Figures]:
    """Add latencies to the costs."""
    if seconds <= 0:
        return list(costs)
    found = latency(paths, [feed] * len(paths), device=device, threads=threads, seconds=seconds, log=log)
    if device.startswith("cuda") and found[0].provider != "CUDAExecutionProvider":
        text = f"{device} was asked for, but onnxruntime ran on {found[0].provider}"
        log(Event("latency", text, level="warning"))
    return [cost.model_copy(update={"latency_ms": speed}) for cost, speed in zip(costs, found, strict=True)]


def _caution(fidelity: Fidelity, gate: Gate, confidence: float, classes: int, log: Log) -> None:
    """Warn of conclusions that these samples do not bear."""
    count = fidelity.samples
    of = f"{count} {'held-out ' * fidelity.held_out}sample{'s' * (count != 1)}"
    for text in _doubts(fidelity, gate, of, f"({100 * confidence:g} % confidence)", classes):
        log(Event("verify", text, level="warning"))


def _doubts(fidelity: Fidelity, gate: Gate, of: str, sure: str, classes: int) -> Iterator[str]:
    if not fidelity.held_out:
        yield "the samples that judge are those that fitted (hold-out 0): new ones will do worse"
    wanted, least = _COARSE if gate.max_drop is None else gate.max_drop, fidelity.smallest_drop
    if fidelity.drop is not None and (least is None or least > wanted):
        what = "any drop" if least is None else f"a drop below {least:.2f} points"
        yield f"{of} cannot tell {what} from none {sure}"
    if classes == 1 and fidelity.accuracy_teacher is not None and fidelity.samples > 1:
        yield f"all of {of} have the same label, which says little; if their folder is no class, pass it as --shots"
    bounds = [output for output in fidelity.outputs if output.relative_l2 is not None]
    worst = max(bounds, key=lambda output: output.relative_l2 or 0.0, default=None)
    if worst is None:
        return
    edge = max(_HARMLESS, _OVERFIT * fidelity.fit_error) if fidelity.fit_error is not None else math.inf
    if (worst.low or 0.0) > edge:
        yield (
            f"overfitted: the relative error is {fidelity.fit_error:.4f} on samples that fitted and "
            f"{worst.relative_l2:.4f} on {of}; give more or more varied samples, or remove less"
        )
    if gate.max_error is not None and fidelity.samples < FEW:
        bound = "nothing bounds it" if worst.high is None else f"it may be {worst.high:.4g}"
        yield f"the error on others is hardly known from {of}: {bound} {sure}"


def file_facts(path: str | Path) -> FileInfo:
    """Return what a report says of a model's file."""
    return FileInfo(path=legible(str(path)), sha256=fingerprint(path), bytes=file_bytes(path))


def shots_facts(shots: Samples, path: str) -> FileInfo:
    """Fingerprint the samples as they are fed: preprocessing and drawing included."""
    digest, size = hashlib.sha256(), 0
    named = dict(shots.inputs) | ({} if shots.labels is None else {"": shots.labels})
    for name, values in sorted(named.items()):
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        for start in range(0, len(values), 64):  # what is asked for is read: all at once may not fit
            digest.update(np.ascontiguousarray(values[start : start + 64]).data)
        size += values.nbytes
    return FileInfo(path=path, sha256=digest.hexdigest(), bytes=size)
