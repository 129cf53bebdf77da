"""What a strict gate asks unasked: a smaller file, a student not slower beyond the noise, weights removed."""

from __future__ import annotations

import numpy as np
import pytest

from xdonnx.errors import JobError
from xdonnx.gate import STRICT, Gate, judge, of_a_job, rejudge, verdict
from xdonnx.report import Figures, GateResult, Latency, Report, Tool, gate_line


def timed(milliseconds: np.ndarray) -> Latency:
    q1, median, q3 = np.percentile(milliseconds, (25, 50, 75))
    return Latency(median=median, q1=q1, q3=q3, provider="CPU", threads=1, runs=len(milliseconds), batch=1)


def steady(milliseconds: float, runs: int = 200) -> Latency:
    return timed(np.full(runs, milliseconds))


def figures(size: int = 1000, params: int = 100, nonzero: int = 100, speed: Latency | None = None) -> Figures:
    return Figures(bytes=size, params=params, nonzero=nonzero, macs=1, latency_ms=speed or steady(100.0))


def judged(teacher: Figures, student: Figures, **limits) -> dict[str, GateResult]:
    return {result.name: result for result in judge(teacher, student, None, Gate(strict=True, **limits))}


@pytest.mark.parametrize(("size", "passed"), [(999, True), (1000, False), (1001, False)])
def test_the_file_has_to_be_smaller_by_a_byte(size: int, passed: bool) -> None:
    assert judged(figures(), figures(size, params=50))["smaller"].passed is passed


@pytest.mark.parametrize(
    ("params", "nonzero", "passed"),
    [(99, 99, True), (100, 99, True), (90, 100, True), (90, 120, True), (100, 100, False), (100, 101, False)],
)
def test_a_weight_has_to_be_gone_or_zero(params: int, nonzero: int, passed: bool) -> None:
    assert judged(figures(), figures(900, params, nonzero))["removed"].passed is passed


# Of 200 steady runs: the student's latency over the teacher's 100 ms and the 0.05 ms that are no slowdown.
@pytest.mark.parametrize(("after", "passed"), [(104.0, True), (1.05 * 100.05, True), (105.2, False), (200.0, False)])
def test_the_student_may_be_slower_by_five_per_cent(after: float, passed: bool) -> None:
    result = judged(figures(), figures(900, 50, speed=steady(after)))["not_slower"]
    assert result.passed is passed and result.value == round(after / 100, 3)
    assert result.bound == round(after / 100.05, 3) and result.limit == 1.05


def test_a_student_whose_quartiles_overlap_the_teachers_is_not_slower() -> None:
    generator = np.random.default_rng(0)
    before = timed(generator.normal(10, 2, 200))
    after = timed(generator.normal(12, 2, 200))
    apart = timed(generator.normal(16, 2, 200))

    assert after.median / before.median > 1.15
    assert judged(figures(speed=before), figures(900, 50, speed=after))["not_slower"].passed
    assert not judged(figures(speed=before), figures(900, 50, speed=apart))["not_slower"].passed


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("runs", [7, 20, 200])
@pytest.mark.parametrize("milliseconds", [0.01, 1.0, 500.0])
def test_a_teacher_is_not_slower_than_itself_in_100_noisy_trials_of_100(
    milliseconds: float, runs: int, noise: float
) -> None:
    generator = np.random.default_rng(1)

    def trial() -> Figures:
        """Return latencies with a long tail: every tenth run is interrupted and takes thrice as long."""
        times = milliseconds * generator.lognormal(0, noise, runs) * (1 + 2 * (generator.random(runs) < 0.1))
        return figures(speed=timed(times))

    passed = [judged(trial(), trial())["not_slower"].passed for _ in range(100)]
    assert passed == [True] * 100


@pytest.mark.parametrize("runs", [7, 20, 200])
def test_a_student_half_as_fast_is_found_out_for_all_the_noise(runs: int) -> None:
    generator = np.random.default_rng(2)
    found = []
    for _ in range(100):
        before, after = (timed(middle * generator.lognormal(0, 0.05, runs)) for middle in (1.0, 2.0))
        found.append(judged(figures(speed=before), figures(900, 50, speed=after))["not_slower"].passed)
    assert found == [False] * 100


def test_a_few_hundredths_of_a_millisecond_are_no_slowdown() -> None:
    before = figures(speed=steady(0.05))
    assert judged(before, figures(900, 50, speed=steady(0.09)))["not_slower"].passed
    assert not judged(before, figures(900, 50, speed=steady(0.11)))["not_slower"].passed


def test_limits_of_ones_own_take_the_place_of_those_unasked() -> None:
    student = figures(1000, 50, speed=steady(150.0))

    assert set(judged(figures(), student)) == set(STRICT)
    own = judged(figures(), student, min_shrink=0.0, max_latency_ratio=1.5)
    assert {name: result.passed for name, result in own.items()} == {
        "min_shrink": True,
        "max_latency_ratio": True,
        "removed": True,
    }


def test_what_is_only_warned_of_does_not_reject_and_the_reason_says_how() -> None:
    teacher, same = figures(), figures(speed=steady(300.0))

    broken = verdict(judge(teacher, same, None, Gate(strict=True)))
    assert (broken["exit_code"], broken["status"]) == (3, "rejected")
    assert broken["reasons"] == (
        "smaller: 0 bytes, allowed at least 1 bytes: the file did not shrink (meant so? --warn-only smaller)",
        "not_slower: 3.000 (bound 2.999), allowed at most 1.05: the student is slower than the teacher, beyond "
        "the noise (meant so? --warn-only not-slower)",
        "removed: 0 weights, allowed at least 1 weights: nothing was removed (meant so? --warn-only removed)",
    )

    results = judge(teacher, same, None, Gate(strict=True, warn_only=tuple(STRICT)))
    assert [(result.level, result.passed) for result in results] == [("warn", False)] * 3
    assert verdict(results)["exit_code"] == 0


def test_a_misspelt_gate_is_refused_with_the_nearest() -> None:
    with pytest.raises(JobError, match="Did you mean 'not_slower'"):
        Gate(warn_only=("no_slower",))


def test_a_latency_that_was_not_measured_cannot_be_judged() -> None:
    bare = Figures(bytes=10, params=1, nonzero=1, macs=1)
    with pytest.raises(JobError, match="gate not_slower: no latency was measured"):
        judge(bare, bare, None, Gate(strict=True))


def test_a_saved_report_is_asked_again_what_it_was_asked() -> None:
    def report(gates: tuple[GateResult, ...] = ()) -> Report:
        return Report(
            status="passed",
            exit_code=0,
            started="2026-01-01T00:00:00+00:00",
            seconds=1,
            tool=Tool(version="1", onnx=None, onnxruntime=None, torch=None),
            command="",
            job={},
            seed=0,
            device="cpu",
            files={},
            teacher=figures(),
            student=figures(1000, 50),
            fidelity={"samples": 1, "held_out": True, "outputs": ()},
            gates=gates,
        )

    limits = Gate(max_latency_ratio=2)
    assert rejudge(report(), limits).exit_code == 0
    strict = rejudge(report(), Gate(max_latency_ratio=2, strict=True))
    assert strict.exit_code == 3 and [line.partition(":")[0] for line in strict.reasons] == ["smaller"]
    assert rejudge(report(strict.gates), limits).exit_code == 3
    assert rejudge(report(strict.gates), Gate(max_latency_ratio=2, warn_only=("smaller",))).exit_code == 0


def test_counts_are_shown_whole() -> None:
    result = judged(figures(12345), figures(345, 50))["smaller"]
    assert gate_line(result) == "smaller: 12,000 bytes, allowed at least 1 bytes"


@pytest.mark.parametrize(("structure", "level"), [("channel", "fail"), ("element", "fail"), ("2:4", "warn")])
def test_a_pattern_is_not_asked_to_shrink_the_file(structure: str, level: str) -> None:
    """Its zeros are stored like other weights; what reads the pattern gains elsewhere."""
    found = {result.name: result for result in judge(figures(), figures(), None, of_a_job(Gate(), structure))}

    assert not found["smaller"].passed and found["smaller"].level == level
    assert found["removed"].level == "fail"
