"""Limits: at, above and below; rounding, confidence, and what cannot be judged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdonnx.errors import JobError
from xdonnx.gate import Gate, judge, rejudge, verdict
from xdonnx.intervals import tango, wilson
from xdonnx.report import Drop, Fidelity, Figures, Latency, OutputError, Report, Tool, gate_line


def figures(size: int, milliseconds: float | None = None) -> Figures:
    speed = milliseconds and Latency(
        median=milliseconds, q1=milliseconds, q3=milliseconds, provider="CPU", threads=1, runs=9, batch=1
    )
    return Figures(bytes=size, params=1, nonzero=1, macs=1, latency_ms=speed or None)


def accuracy(lost: int, gained: int, samples: int) -> Fidelity:
    interval = tango(lost, gained, samples)
    drop = Drop(**vars(interval), of="accuracy", lost=lost, gained=gained)
    return Fidelity(samples=samples, held_out=True, drop=drop, outputs=())


def agreement(lost: int, samples: int) -> Fidelity:
    drop = Drop(**vars(wilson(lost, samples)), of="agreement", lost=lost, gained=0)
    return Fidelity(samples=samples, held_out=True, drop=drop, outputs=())


def error(*values: float | None, high: float | None = 9.0) -> Fidelity:
    outputs = tuple(
        OutputError(name=f"y{place}", relative_l2=value, low=0.0, high=high, confidence=0.95, max_abs=1.0, cosine=1.0)
        for place, value in enumerate(values)
    )
    return Fidelity(samples=10, held_out=True, outputs=outputs)


def a_report(fidelity: Fidelity | None, **facts) -> Report:
    given = {"status": "passed", "exit_code": 0} | facts
    return Report(
        started="2026-01-01T00:00:00+00:00",
        seconds=1,
        tool=Tool(version="1", onnx=None, onnxruntime=None, torch=None),
        command="",
        job={},
        seed=0,
        device="cpu",
        files={},
        teacher=figures(1000, 2.0),
        student=figures(500, 1.0),
        fidelity=fidelity,
        **given,
    )


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        (Gate(max_drop=2.01), True),
        (Gate(max_drop=2.0), True),
        (Gate(max_drop=1.99), False),
        (Gate(max_error=0.06), True),
        (Gate(max_error=0.05), True),
        (Gate(max_error=0.04), False),
        (Gate(min_shrink=0.39), True),
        (Gate(min_shrink=0.4), True),
        (Gate(min_shrink=0.41), False),
        (Gate(max_latency_ratio=0.91), True),
        (Gate(max_latency_ratio=0.9), True),
        (Gate(max_latency_ratio=0.89), False),
    ],
)
def test_a_limit_is_kept_below_and_at_it_and_broken_beyond(gate: Gate, passed: bool) -> None:
    fidelity = accuracy(3, 1, 100).model_copy(update={"outputs": error(0.02, 0.05).outputs})

    results = judge(figures(1000, 1.0), figures(600, 0.9), fidelity, gate)

    assert [result.passed for result in results] == [passed]
    assert verdict(results)["exit_code"] == (0 if passed else 3)
    assert verdict(results)["status"] == ("passed" if passed else "rejected")


def test_without_limits_nothing_is_judged() -> None:
    assert judge(None, None, None, Gate()) == []
    assert verdict([]) == {"status": "passed", "exit_code": 0, "reasons": ()}


# Rounded as numbers usually are, each of these keeps its limit.
@pytest.mark.parametrize(
    ("fidelity", "gate", "line"),
    [
        (accuracy(2, 0, 50_000), Gate(max_drop=0), "max_drop: 0.004 points, allowed at most 0 points"),
        (accuracy(251, 0, 25_000), Gate(max_drop=1), "max_drop: 1.004 points, allowed at most 1 points"),
        (agreement(1, 199), Gate(max_drop=0.5), "max_drop: 0.503 points, allowed at most 0.5 points"),
        (error(4.9e-7), Gate(max_error=1e-8), "max_error: 0.0000005 relative L2, allowed at most 1e-08 relative L2"),
        (error(3e-14), Gate(max_error=0), "max_error: 3e-14 relative L2, allowed at most 0 relative L2"),
    ],
)
def test_rounding_hides_no_breach(fidelity: Fidelity, gate: Gate, line: str) -> None:
    (result,) = judge(None, None, fidelity, gate)
    assert not result.passed and gate_line(result) == line


def test_decimals_are_added_where_a_kept_limit_would_look_broken() -> None:
    (result,) = judge(None, None, agreement(7, 199), Gate(max_drop=3.518))
    assert 3.5175 < result.value < result.limit
    assert gate_line(result) == "max_drop: 3.518 points, allowed at most 3.518 points" and result.passed


@pytest.mark.parametrize("lost", range(101))
def test_arithmetic_breaks_no_limit_that_is_kept_exactly(lost: int) -> None:
    """7 of 100 samples are 7.000000000000001 points, and a file of 70 of 100 bytes is 0.30000000000000004 smaller."""
    (drop,) = judge(None, None, agreement(lost, 100), Gate(max_drop=lost))
    assert drop.passed and drop.value == lost
    if lost < 100:
        (shrink,) = judge(figures(100), figures(100 - lost), None, Gate(min_shrink=lost / 100))
        assert shrink.passed and shrink.value == lost / 100


def test_with_a_confidence_the_far_end_of_the_interval_is_judged() -> None:
    fidelity = accuracy(2, 1, 100)

    (point,) = judge(None, None, fidelity, Gate(max_drop=2))
    (bound,) = judge(None, None, fidelity, Gate(max_drop=2, confidence=0.9))

    assert point.passed and point.bound == point.value == 1.0
    assert not bound.passed and bound.value == 1.0
    # The counts are in the report, so any confidence can be judged, not only the one it was written with.
    assert bound.bound == pytest.approx(tango(2, 1, 100, 0.9).high) != fidelity.drop.high
    assert f"1.00 points (may be {bound.bound:.2f} points)" in gate_line(bound)


def test_without_labels_the_bound_is_that_of_the_disagreement() -> None:
    (result,) = judge(None, None, agreement(3, 50), Gate(max_drop=10, confidence=0.8))
    assert (result.value, result.bound) == (6.0, pytest.approx(wilson(3, 50, 0.8).high))


def test_a_confident_error_needs_the_interval_of_that_confidence() -> None:
    (result,) = judge(None, None, error(0.1, 0.2, high=0.3), Gate(max_error=0.25, confidence=0.95))
    assert (result.value, result.bound, result.passed) == (0.2, 0.3, False)
    with pytest.raises(JobError, match=r"not 0\.9\."):
        judge(None, None, error(0.1), Gate(max_error=0.25, confidence=0.9))
    # What `--confidence 99.9%` was before it was read as a decimal.
    outputs = (error(0.1).outputs[0].model_copy(update={"confidence": 99.9 / 100}),)
    (same,) = judge(None, None, error().model_copy(update={"outputs": outputs}), Gate(max_error=9, confidence=0.999))
    assert 99.9 / 100 != 0.999 and same.passed


def test_an_error_that_so_few_samples_do_not_bound_keeps_no_limit_at_a_confidence() -> None:
    fidelity = error(0.1, high=None)
    (point,) = judge(None, None, fidelity, Gate(max_error=0.2))
    (bound,) = judge(None, None, fidelity, Gate(max_error=0.2, confidence=0.95))
    assert point.passed
    assert (bound.value, bound.bound, bound.passed) == (0.1, None, False)
    assert gate_line(bound) == "max_error: 0.100000 relative L2 (no bound), allowed at most 0.2 relative L2"


def test_an_output_that_was_not_compared_keeps_no_limit() -> None:
    other = OutputError(name="boxes", relative_l2=None, max_abs=None, cosine=None, compared=False)
    fidelity = error(0.1).model_copy(update={"outputs": (*error(0.1).outputs, other)})
    (result,) = judge(None, None, fidelity, Gate(max_error=1e9))
    assert (result.value, result.bound, result.passed) == (None, None, False)


def test_an_error_without_bound_keeps_no_limit() -> None:
    (result,) = judge(None, None, error(0.1, None), Gate(max_error=1e9))
    assert (result.value, result.bound, result.passed) == (None, None, False)
    assert "no bound" in gate_line(result)


def test_warn_only_limits_do_not_reject() -> None:
    gate = Gate(max_drop=0.5, min_shrink=0.9, warn_only=("min_shrink",))

    results = judge(figures(1000), figures(900), accuracy(0, 0, 50), gate)

    assert [(result.name, result.level, result.passed) for result in results] == [
        ("max_drop", "fail", True),
        ("min_shrink", "warn", False),
    ]
    assert verdict(results)["status"] == "passed"


def test_the_reasons_of_a_rejection_name_every_broken_limit() -> None:
    results = judge(figures(1000, 1.0), figures(999, 1.5), None, Gate(min_shrink=0.1, max_latency_ratio=1))
    assert verdict(results)["reasons"] == (
        "min_shrink: 0.10 %, allowed at least 10 %",
        "max_latency_ratio: 1.500, allowed at most 1",
    )


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (Gate(max_drop=1), "no output classifies"),
        (Gate(max_error=1), "no output of floating-point numbers"),
        (Gate(min_shrink=0.1), "neither model was measured"),
        (Gate(max_latency_ratio=1), "neither model was measured"),
    ],
)
def test_a_limit_on_what_was_not_measured_is_refused(gate: Gate, message: str) -> None:
    with pytest.raises(JobError, match=message):
        judge(None, None, Fidelity(samples=1, held_out=True, outputs=()), gate)


def test_a_limit_on_the_latency_needs_one() -> None:
    with pytest.raises(JobError, match="no latency was measured"):
        judge(figures(10), figures(10), None, Gate(max_latency_ratio=1))


@pytest.mark.parametrize(
    "limits",
    [
        {"max_drop": -1.0},
        {"max_error": float("nan")},
        {"max_drop": float("inf")},
        {"min_shrink": 1.0},
        {"confidence": 95.0},
        {"confidence": 0.0},
        {"confidence": 0.9999999999999999},
        {"warn_only": ("max_drops",)},
    ],
)
def test_limits_that_make_no_sense_are_refused(limits) -> None:
    with pytest.raises(JobError):
        Gate(**limits)


def test_a_saved_report_can_be_judged_again_by_other_limits() -> None:
    report = a_report(accuracy(3, 1, 100))

    rejected = rejudge(report, Gate(max_drop=1))
    assert (rejected.status, rejected.exit_code) == ("rejected", 3)
    assert rejected.reasons == ("max_drop: 2.00 points, allowed at most 1 points",)

    passed = rejudge(rejected, Gate(max_drop=2, min_shrink=0.5))
    assert (passed.status, passed.exit_code, passed.reasons) == ("passed", 0, ())
    assert [result.name for result in passed.gates] == ["max_drop", "min_shrink"]


def test_a_failed_job_stays_failed_whatever_the_limits() -> None:
    report = a_report(accuracy(0, 0, 100), status="failed", exit_code=6, reasons=("opset",))
    again = rejudge(report, Gate(max_drop=50))
    assert (again.status, again.exit_code, again.reasons) == ("failed", 6, ("opset",))
    assert again.gates[0].passed


def test_a_job_that_failed_before_it_measured_is_not_judged() -> None:
    report = a_report(None, status="failed", exit_code=6, reasons=("opset",))
    assert rejudge(report, Gate(max_drop=1)) == report


def read(text: str) -> tuple[float, str]:
    """Return the number and the unit of '0.50 points', '12.34 %' or '1.050'."""
    number, _, unit = text.replace(",", "").partition(" ")
    return float(number), unit


limits = st.one_of(
    st.floats(0, 120, allow_subnormal=False),
    st.decimals(0, 100, places=2).map(float),
    st.builds(lambda near, off: near / 100 + off, st.integers(0, 300), st.sampled_from([0.0, 1e-9, -1e-17, 1e-13])),
).filter(lambda limit: limit >= 0)


@given(
    counts=st.integers(1, 2000).flatmap(
        lambda n: st.tuples(st.integers(0, n), st.just(n)),
    ),
    share=st.floats(0, 3),
    sizes=st.tuples(st.integers(1, 10**9), st.integers(1, 10**9)),
    times=st.tuples(st.floats(1e-3, 1e4), st.floats(1e-3, 1e4)),
    limit=limits,
    name=st.sampled_from(["max_drop", "max_error", "min_shrink", "max_latency_ratio"]),
    confidence=st.sampled_from([None, 0.95]),
)
def test_who_reads_the_line_comes_to_the_same_verdict(counts, share, sizes, times, limit, name, confidence) -> None:
    """As many digits are printed as it takes to see whether the limit was kept."""
    lost, samples = counts
    fidelity = agreement(lost, samples).model_copy(update={"outputs": error(share, high=1.1 * share).outputs})
    limit = limit / 130 if name == "min_shrink" else limit
    gate = Gate(**{name: limit}, confidence=confidence)
    teacher, student = (figures(size, time) for size, time in zip(sizes, times, strict=True))

    (result,) = judge(teacher, student, fidelity, gate)

    line = gate_line(result).removeprefix(f"{name}: ")
    measured, _, asked = line.partition(", allowed ")
    judged = measured.partition(" (may be ")[2].removesuffix(")") or measured
    most, word = asked.startswith("at most "), asked.removeprefix("at most ").removeprefix("at least ")
    (number, unit), (wanted, same) = read(judged), read(word)
    assert unit == same
    assert result.passed is (number <= wanted if most else number >= wanted)


@given(sizes=st.tuples(st.integers(1, 10**9), st.integers(1, 10**9)), name=st.sampled_from(["smaller", "removed"]))
def test_counts_are_judged_as_they_are_printed(sizes, name) -> None:
    teacher, student = (
        Figures(bytes=size, params=size, nonzero=size, macs=1, latency_ms=figures(1, 1.0).latency_ms) for size in sizes
    )
    (result,) = (r for r in judge(teacher, student, None, Gate(strict=True)) if r.name == name)

    assert read(gate_line(result).removeprefix(f"{name}: ").partition(", allowed")[0])[0] == sizes[0] - sizes[1]
    assert result.passed is (sizes[0] > sizes[1])
