"""What limits say of a student besides passed and failed: whether any was set, what is lost, what to try next.

Whoever draws a report asks this, so nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xdonnx.report import Fidelity, GateResult, Report

# What `strict` asks besides, and the limit of one's own that takes its place. Bytes and weights are counted, so the
# least that counts is 1; a ratio of latencies that noise alone cannot explain has to pass 5 % besides.
STRICT: Mapping[str, tuple[str, float, str | None]] = {
    "smaller": ("bytes", 1, "min_shrink"),
    "not_slower": ("ratio", 1.05, "max_latency_ratio"),
    "removed": ("weights", 1, None),
}
CLOSER = "remove less, or give more samples; the most accurate is --method cross --preset-effort best"
_QUICKER = "time both again where nothing else runs: xdonnx bench; --round-to 8 keeps widths that are fast"
# What to try where a limit was broken.
_NEXT = {
    "max_drop": CLOSER,
    "max_error": CLOSER,
    "min_shrink": "remove more, as by --macs 30%",
    "smaller": "remove more, as by --macs 30%",
    "removed": "see what may go: xdonnx inspect",
    "max_latency_ratio": _QUICKER,
    "not_slower": _QUICKER,
}
# Nothing is removed from a given student.
_MORE, _CUT = "give more samples, or correct its matching: xdonnx match", "cut more with the tool that made the student"
_OF_A_GIVEN = {"max_drop": _MORE, "max_error": _MORE, "min_shrink": _CUT, "smaller": _CUT, "removed": _CUT}
# So many points surely lost, or such a relative error, are much, whatever the student is for.
_HEAVY, _FAR = 5.0, 0.5
# Fewer numbers than this may as well be coordinates or measurements.
_FEW = 10


def limited(report: Report) -> bool:
    """Whether a limit that somebody set was judged, or the job failed: without either nothing was passed."""
    return report.status != "passed" or any(gate.name not in STRICT for gate in report.gates)


def next_step(report: Report) -> str:
    """Return what to try where limits rejected a student that was made here; nothing where none did."""
    broken = {gate.name for gate in report.gates if gate.level == "fail" and not gate.passed}
    if report.status != "rejected" or "method" not in report.job:
        return ""
    if broken & {"max_drop", "max_error"} and broken & {"min_shrink", "smaller", "removed"}:
        return "give more samples: to remove less breaks one of these limits, to remove more another"
    steps = _OF_A_GIVEN if report.matches else _NEXT
    return "; or ".join(dict.fromkeys(step for name, step in steps.items() if name in broken))


def warned(report: Report, heard: Sequence[str]) -> tuple[str, ...]:
    """Return what was heard and the report's own warnings, each once, that of a heavy loss first."""
    return tuple(dict.fromkeys((*heavy_loss(report.fidelity, report.gates), *heard, *report.warnings)))


def heavy_loss(fidelity: Fidelity | None, gates: Sequence[GateResult]) -> tuple[str, ...]:
    """Return a warning where a student surely lost much and no gate set a limit on that; else nothing."""
    if fidelity is None or {"max_drop", "max_error"} & {gate.name for gate in gates}:
        return ()
    drop = fidelity.drop
    if drop is not None:
        if drop.low < _HEAVY:
            return ()
        sure = f"at least {drop.low:.1f} ({100 * drop.confidence:g} % confidence)"
        lost = f"the student lost {drop.value:.2f} points of {drop.of}, {sure}"
        return (f"{lost}, and no limit was set: --max-drop 1 rejects such a student; {CLOSER}",)
    worst = max((output.low or 0.0 for output in fidelity.outputs), default=0.0)
    if worst < _FAR:
        return ()
    lost = f"the student's answers are off by at least {100 * worst:.0f} % (relative L2)"
    return (f"{lost}, and no limit was set: --max-error 0.1 rejects such a student; {CLOSER}",)


def compared(fidelity: Fidelity, name: str = "") -> str:
    """Say whose largest number is compared, where that is not plain: of several outputs, or without labels.

    Parameters
    ----------
    fidelity : Fidelity
    name : str, optional
        The output as it is to be called; default: in quotes.
    """
    if not fidelity.classifier or (len(fidelity.outputs) < 2 and fidelity.accuracy_teacher is not None):
        return ""
    shape = f", (N, {fidelity.classes})" if fidelity.classes else ""
    name = name or f"'{fidelity.classifier}'"
    return f"largest of {name}{shape}"


def doubtful(report: Report) -> str:
    """Say that few numbers without labels are taken for scores of classes, which coordinates are not."""
    fidelity = report.fidelity
    if fidelity is None or fidelity.accuracy_teacher is not None or fidelity.probable or not fidelity.classes:
        return ""
    if fidelity.classes >= _FEW or any(gate.name == "max_error" for gate in report.gates):
        return ""
    what = f"'{fidelity.classifier}', (N, {fidelity.classes}), is taken for scores of classes"
    return f"{what}: if it holds none, judge by --max-error"
