"""The limits that a student must keep, and how they are judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xdonnx.errors import JobError
from xdonnx.intervals import drop_interval
from xdonnx.report import UNITS, Fidelity, Figures, GateResult, Report, gate_line


@dataclass(frozen=True)
class Gate:
    """The limits that a student must keep; None asks for nothing.

    Parameters
    ----------
    max_drop : float, optional
        Points of accuracy where labels are given, else of agreement with the teacher.
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

    def __post_init__(self) -> None:
        for name in GATES:
            limit = getattr(self, name)
            if limit is not None and not (math.isfinite(limit) and limit >= 0):
                raise JobError(f"gate {name} = {limit} is no limit.\n  Give a number that is not negative.")
        if self.min_shrink is not None and self.min_shrink >= 1:
            raise JobError(
                f"gate min_shrink = {self.min_shrink} asks for a file of no bytes.\n  Give a fraction: 0.1 is 10 %."
            )
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise JobError(f"confidence {self.confidence} is not between 0 and 1.\n  Usual: 0.95.")
        for name in self.warn_only:
            if name not in GATES:
                raise JobError(f"no gate is called '{name}'.\n  Gates: {', '.join(GATES)}.")


GATES: Mapping[str, str] = {
    "max_drop": "points",
    "max_error": "relative L2",
    "min_shrink": "fraction",
    "max_latency_ratio": "ratio",
}


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
    Rounding never decides: value and bound are rounded to the decimals that are shown (two of a point, six of an
    error, two of a percentage, three of a ratio), and these are what is compared with the limit as given.
    """
    found = []
    value: float | None
    bound: float | None
    for name, unit in GATES.items():
        limit = getattr(gate, name)
        if limit is None:
            continue
        if name == "max_drop":
            value, bound = _drop(fidelity, gate.confidence)
        elif name == "max_error":
            value, bound = _error(fidelity, gate.confidence)
        elif teacher is None or student is None:
            raise JobError(f"gate {name}: neither model was measured.")
        elif name == "min_shrink":
            value = bound = 1 - student.bytes / teacher.bytes
        elif teacher.latency_ms is None or student.latency_ms is None:
            raise JobError("gate max_latency_ratio: no latency was measured.\n  Leave the latency run on.")
        else:
            value = bound = student.latency_ms.median / teacher.latency_ms.median
        value, bound = (None if number is None else round(number, UNITS[unit]) for number in (value, bound))
        passed = bound is not None and (bound >= limit if name == "min_shrink" else bound <= limit)
        found.append(
            GateResult(
                name=name,
                value=value,
                bound=bound,
                limit=limit,
                unit=unit,
                level="warn" if name in gate.warn_only else "fail",
                passed=passed,
            )
        )
    return found


def rejudge(report: Report, gate: Gate) -> Report:
    """Return the report as it would read had these been the limits; a failed job stays failed.

    Raises
    ------
    JobError
        A limit is set on something that the report does not hold.
    """
    if report.status == "failed" and report.fidelity is None:
        return report
    gates = judge(report.teacher, report.student, report.fidelity, gate)
    if report.status == "failed":
        return report.model_copy(update={"gates": tuple(gates)})
    return report.model_copy(update=verdict(gates) | {"gates": tuple(gates)})


def verdict(gates: Sequence[GateResult]) -> dict[str, Any]:
    """Return the status, exit code and reasons of a job that did not fail before its gates."""
    broken = tuple(gate_line(gate) for gate in gates if gate.level == "fail" and not gate.passed)
    return {
        "status": "rejected" if broken else "passed",
        "exit_code": 3 if broken else 0,
        "reasons": broken,
    }


def _drop(fidelity: Fidelity | None, confidence: float | None) -> tuple[float, float]:
    drop = fidelity.drop if fidelity else None
    if fidelity is None or drop is None:
        raise JobError(
            "gate max_drop: no output classifies, so there is no accuracy and no agreement to lose.\n"
            "  Set max_error instead."
        )
    if confidence is None:
        return drop.value, drop.value
    return drop.value, drop_interval(drop.of, drop.lost, drop.gained, fidelity.samples, confidence).high


def _error(fidelity: Fidelity | None, confidence: float | None) -> tuple[float | None, float | None]:
    outputs = [output for output in fidelity.outputs if output.max_abs is not None] if fidelity else []
    if not outputs:
        raise JobError("gate max_error: no output of floating-point numbers was compared.")
    errors = [output.relative_l2 for output in outputs]
    value = None if None in errors else max(error for error in errors if error is not None)
    if confidence is None or value is None:
        return value, value
    for output in outputs:
        if output.high is None or output.confidence != confidence:
            raise JobError(
                f"gate max_error: the error of '{output.name}' was bounded at confidence {output.confidence}, "
                f"not {confidence}.\n  Measure again with --confidence {confidence}."
            )
    return value, max(output.high for output in outputs if output.high is not None)
