"""The limits that a student must keep, and how they are judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xdonnx.errors import JobError, did_you_mean
from xdonnx.intervals import drop_interval
from xdonnx.limits import STRICT
from xdonnx.report import AT_LEAST, COUNTS, Fidelity, Figures, GateResult, Latency, Report, gate_line


@dataclass(frozen=True)
class Gate:
    """The limits that a student must keep; None asks for nothing.

    Parameters
    ----------
    max_drop : float, optional
        Points of accuracy; of agreement with the teacher where nothing is labelled, or where the teacher is hardly
        better than chance on the labels.
    max_error : float, optional
        Relative L2 error of the worst floating-point output.
    min_shrink : float, optional
        Fraction of the teacher's bytes that must be gone.
    max_latency_ratio : float, optional
        The student's median latency over the teacher's.
    confidence : float, optional
        Judge drop and error by the far end of their interval at this confidence. None: by the measured value.
    warn_only : tuple of str
        Names of limits whose breach is a warning.
    strict : bool
        Whether the student must also be better for something, as `compress` always asks: its file 'smaller', the
        student 'not_slower' beyond the noise, weights 'removed'. An own min_shrink takes the place of the first
        of these, an own max_latency_ratio that of the second.

    Raises
    ------
    JobError
        A limit that no number could keep or break, or an unknown name.
    """

    max_drop: float | None = None
    max_error: float | None = None
    min_shrink: float | None = None
    max_latency_ratio: float | None = None
    confidence: float | None = None
    warn_only: tuple[str, ...] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        for name in GATES:
            limit = getattr(self, name)
            if limit is not None and not (math.isfinite(limit) and limit >= 0):
                raise JobError(f"gate {name} = {limit} is no limit.\n  Give a number that is not negative.")
        if self.min_shrink is not None and self.min_shrink >= 1:
            raise JobError(
                f"gate min_shrink = {self.min_shrink} asks for a file of no bytes.\n  Give a fraction: 0.1 is 10 %."
            )
        if self.confidence is not None and not 0 < self.confidence <= _SUREST:
            raise JobError(f"confidence {self.confidence:.17g} is not above 0 and at most {_SUREST}.\n  Usual: 0.95.")
        for name in self.warn_only:
            if name not in GATES and name not in STRICT:
                near = did_you_mean(name, (*GATES, *STRICT))
                raise JobError(f"no gate is called '{name}'.{near}\n  Gates: {', '.join((*GATES, *STRICT))}.")


GATES: Mapping[str, str] = {
    "max_drop": "points",
    "max_error": "relative L2",
    "min_shrink": "fraction",
    "max_latency_ratio": "ratio",
}
_BLAME = {
    "smaller": "the file did not shrink",
    "not_slower": "the student is slower than the teacher, beyond the noise",
    "removed": "nothing was removed",
}
# Beyond this confidence the formulas of intervals say nothing of few samples, and floating point nothing at all.
_SUREST = 0.999999
_NO_CLASSES = (
    "gate max_drop: no output classifies, so there is no accuracy and no agreement to lose.\n  Set max_error instead."
)
_NO_NUMBERS = "gate max_error: no output of floating-point numbers was compared.\n  Set max_drop, or leave it out."
# Quartiles of few runs are themselves uncertain: with r runs they are moved out by the factor 1 + 10 / r. And so many
# milliseconds more are no slowdown that anyone meets: in models this small the call itself and the layout that
# onnxruntime picks for odd numbers of channels weigh more than the arithmetic.
_FEW_RUNS, _TRIFLE = 10, 0.05
# How many times as many samples are tried to find what a limit wants.
_TIMES = (*range(2, 21), 25, 30, 40, 50, 75, 100)


def of_a_job(gate: Gate, structure: str) -> Gate:
    """Return the gate with what is asked of every job; a pattern such as 2:4 is not meant to shrink the file."""
    meant = ("smaller",) if ":" in structure else ()
    return replace(gate, strict=True, warn_only=(*gate.warn_only, *meant))


def check_measurable(gate: Gate, *, classifies: bool, floating: Sequence[str], odd: Sequence[str]) -> None:
    """Make sure that a model's outputs are such that the gate can judge them, before any work.

    Parameters
    ----------
    gate : Gate
    classifies : bool
        Whether an output does.
    floating, odd : sequence of str
        Outputs of floating-point numbers, and those that are no tensors.

    Raises
    ------
    JobError
        A limit is set on what no answer of this model shows.
    """
    if gate.max_drop is not None and not classifies:
        raise JobError(_NO_CLASSES)
    if gate.max_error is not None and odd:
        raise JobError(f"gate max_error: output '{odd[0]}' is no tensor, so nothing bounds its error.\n  Leave it out.")
    if gate.max_error is not None and not floating:
        raise JobError(_NO_NUMBERS)


def judge(teacher: Figures | None, student: Figures | None, fidelity: Fidelity | None, gate: Gate) -> list[GateResult]:
    """Compare what was measured with the limits.

    Parameters
    ----------
    teacher, student : Figures, optional
    fidelity : Fidelity, optional
    gate : Gate

    Returns
    -------
    list of GateResult
        One for each limit that the gate sets.

    Raises
    ------
    JobError
        A limit is set on something that was not measured.

    Notes
    -----
    Ten digits are compared, of the bound as of the limit: fewer would pass a breach that is small, more would let the
    arithmetic decide (7 of 100 samples are 7.000000000000001 points). Shown are as many as tell the verdict.
    """
    limits = {name: (unit, getattr(gate, name)) for name, unit in GATES.items() if getattr(gate, name) is not None}
    if gate.strict:
        limits |= {name: (unit, limit) for name, (unit, limit, own) in STRICT.items() if own not in limits}
    found = []
    for name, (unit, given) in limits.items():
        limit = _told(given, unit)
        measured = _measured(name, teacher, student, fidelity, gate.confidence)
        value, bound = (None if number is None else _told(number, unit) for number in measured)
        found.append(
            GateResult(
                name=name,
                value=value,
                bound=bound,
                limit=limit,
                unit=unit,
                level="warn" if name in gate.warn_only else "fail",
                passed=bound is not None and (bound >= limit if name in AT_LEAST else bound <= limit),
            )
        )
    return found


def _told(number: float, unit: str) -> float:
    """Return a number with the digits that count; counts have no others."""
    return number if unit in COUNTS else float(f"{number:.10g}")


def rejudge(report: Report, gate: Gate) -> Report:
    """Return the report as it would read had these been the limits; a failed job stays failed.

    What a strict gate asked is asked again, by the report or by the gate; what of that only warned only warns again,
    since the job said so: a pattern such as 2:4 is not meant to shrink the file.

    Raises
    ------
    JobError
        A limit is set on something that the report does not hold.
    """
    if report.status == "failed" and report.fidelity is None:
        return report
    asked = [result for result in report.gates if result.name in STRICT]
    warned = tuple(result.name for result in asked if result.level == "warn")
    gate = replace(gate, strict=gate.strict or bool(asked), warn_only=(*gate.warn_only, *warned))
    gates = judge(report.teacher, report.student, report.fidelity, gate)
    if report.status == "failed":
        return report.model_copy(update={"gates": tuple(gates)})
    return report.model_copy(update=verdict(gates, report.fidelity, gate.confidence) | {"gates": tuple(gates)})


def softened(report: Report, gate: Gate) -> Gate:
    """Return the limits that a report was judged by, judged as the gate says: its confidence, and what only warns."""
    given = report.job.get("gate")
    confidence = given.get("confidence") if isinstance(given, dict) else None
    warned = tuple(result.name for result in report.gates if result.level == "warn")
    return Gate(
        **{result.name: result.limit for result in report.gates if result.name in GATES},
        confidence=gate.confidence or (confidence if isinstance(confidence, float) else None),
        warn_only=(*warned, *gate.warn_only),
        strict=any(result.name in STRICT for result in report.gates),
    )


def verdict(
    gates: Sequence[GateResult], fidelity: Fidelity | None = None, confidence: float | None = None
) -> dict[str, Any]:
    """Return the status, exit code and reasons of a job that did not fail before its gates.

    With what was measured, and the confidence that it was judged at, a reason says how many samples it would take.
    """
    broken = tuple(_reason(gate, fidelity, confidence) for gate in gates if gate.level == "fail" and not gate.passed)
    return {
        "status": "rejected" if broken else "passed",
        "exit_code": 3 if broken else 0,
        "reasons": broken,
    }


def _reason(gate: GateResult, fidelity: Fidelity | None, confidence: float | None) -> str:
    """Say what was broken; of a limit that nobody typed also what that means and how to lift it."""
    if gate.name == "max_drop" and fidelity is not None and confidence is not None:
        return gate_line(gate) + _too_few(gate, fidelity, confidence)
    if gate.name not in STRICT:
        return gate_line(gate)
    return f"{gate_line(gate)}: {_BLAME[gate.name]} (meant so? --warn-only {gate.name.replace('_', '-')})"


def _too_few(gate: GateResult, fidelity: Fidelity, confidence: float) -> str:
    """Say how many samples could keep the limit, where the drop keeps it and only its interval does not."""
    drop, samples = fidelity.drop, fidelity.samples
    if drop is None or gate.value is None or gate.bound is None or gate.value >= gate.limit or gate.limit <= 0:
        return ""
    best = drop_interval(drop.of, 0, 0, samples, confidence).high
    times = next(
        (
            times
            for times in _TIMES
            if drop_interval(drop.of, times * drop.lost, times * drop.gained, times * samples, confidence).high
            <= gate.limit
        ),
        None,
    )
    needed = "" if times is None else f"; about {times * samples} that come out alike would do"
    return f": {samples} samples can promise {best:.1f} points at best{needed}"


def _measured(
    name: str,
    teacher: Figures | None,
    student: Figures | None,
    fidelity: Fidelity | None,
    confidence: float | None,
) -> tuple[float | None, float | None]:
    """Return what a gate judges: the measured value, and the bound that is compared."""
    if name == "max_drop":
        return _drop(fidelity, confidence)
    if name == "max_error":
        return _error(fidelity, confidence)
    if teacher is None or student is None:
        raise JobError(f"gate {name}: neither model was measured.")
    if name == "min_shrink":
        shrink = (teacher.bytes - student.bytes) / teacher.bytes
        return shrink, shrink
    if name == "smaller":
        gone: float = teacher.bytes - student.bytes
        return gone, gone
    if name == "removed":
        # Either counts: a refit may fill the zeros of a teacher that was sparse, and zeroed weights stay in the file.
        gone = max(teacher.params - student.params, teacher.nonzero - student.nonzero)
        return gone, gone
    before, after = teacher.latency_ms, student.latency_ms
    if before is None or after is None:
        raise JobError(f"gate {name}: no latency was measured.\n  Leave the latency run on.")
    ratio = after.median / before.median
    return ratio, ratio if name == "max_latency_ratio" else _least_ratio(before, after)


def _least_ratio(before: Latency, after: Latency) -> float:
    """Return how many times as slow the student is at the least, noise and a trifle granted to it.

    That is the lower end of the band of their ratio, as `xdonnx bench` shows it. A report without that band has only
    quartiles: the student's lower over the teacher's upper one, both moved away from their medians where few runs
    were timed.
    """
    if after.ratio is not None:
        return after.ratio.low * before.median / (before.median + _TRIFLE)
    best = after.median - (1 + _FEW_RUNS / after.runs) * (after.median - after.q1)
    worst = before.median + (1 + _FEW_RUNS / before.runs) * (before.q3 - before.median)
    return max(best, 0.0) / (worst + _TRIFLE)


def _drop(fidelity: Fidelity | None, confidence: float | None) -> tuple[float, float]:
    drop = fidelity.drop if fidelity else None
    if fidelity is None or drop is None:
        raise JobError(_NO_CLASSES)
    if confidence is None:
        return drop.value, drop.value
    return drop.value, drop_interval(drop.of, drop.lost, drop.gained, fidelity.samples, confidence).high


def _error(fidelity: Fidelity | None, confidence: float | None) -> tuple[float | None, float | None]:
    outputs = [output for output in fidelity.outputs if output.max_abs is not None] if fidelity else []
    if fidelity and not all(output.compared for output in fidelity.outputs):
        return None, None
    if not outputs:
        raise JobError(_NO_NUMBERS)
    errors = [output.relative_l2 for output in outputs]
    value = None if None in errors else max(error for error in errors if error is not None)
    if confidence is None or value is None:
        return value, value
    for output in outputs:
        if output.confidence is None or not math.isclose(output.confidence, confidence, abs_tol=1e-9):
            raise JobError(
                f"gate max_error: the error of '{output.name}' was bounded at confidence {output.confidence}, "
                f"not {confidence}.\n  Measure again with --confidence {confidence}."
            )
    bounds = [output.high for output in outputs]
    return value, None if None in bounds else max(bound for bound in bounds if bound is not None)
