"""What a strict gate asks unasked: a smaller file, a student not slower beyond the noise, weights removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from xdonnx.errors import JobError
from xdonnx.gate import Gate, judge, of_a_job, rejudge, softened, verdict
from xdonnx.intervals import ratio_band
from xdonnx.limits import STRICT
from xdonnx.report import Figures, GateResult, Latency, LatencyRatio, Report, Tool, gate_line


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
    assert result.passed is passed and result.value == pytest.approx(after / 100)
    assert result.bound == pytest.approx(after / 100.05) and result.limit == 1.05


def test_a_student_whose_quartiles_overlap_the_teachers_is_not_slower() -> None:
    generator = np.random.default_rng(0)
    before = timed(generator.normal(10, 2, 200))
    after = timed(generator.normal(12, 2, 200))
    apart = timed(generator.normal(16, 2, 200))

    assert after.median / before.median > 1.15
    assert judged(figures(speed=before), figures(900, 50, speed=after))["not_slower"].passed
    assert not judged(figures(speed=before), figures(900, 50, speed=apart))["not_slower"].passed


def in_turns(before: np.ndarray, after: np.ndarray) -> tuple[Figures, Figures]:
    """Return teacher and student as they are measured, timed in the same rounds."""
    band = ratio_band(before, after)
    ratio = LatencyRatio(value=band.value, low=band.low, high=band.high, confidence=band.confidence)
    return figures(speed=timed(before)), figures(900, 50, speed=timed(after).model_copy(update={"ratio": ratio}))


def test_noise_that_hits_both_alike_hides_no_slow_student() -> None:
    """Quartiles of a restless machine overlapped where every single pair of runs said 1.5 times as slow."""
    generator = np.random.default_rng(3)
    machine = np.repeat(generator.choice([1.0, 2.5], 40), 5)
    before, after = (middle * machine * generator.lognormal(0, 0.05, 200) for middle in (1.0, 1.5))
    assert timed(after).q1 < timed(before).q3

    result = judged(*in_turns(before, after))["not_slower"]

    assert not result.passed and result.bound == pytest.approx(1.5 / 1.05, rel=0.1)
    assert judged(*in_turns(after, before))["not_slower"].passed


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("runs", [7, 20, 200])
def test_a_teacher_timed_in_turns_with_itself_is_hardly_ever_called_slower(runs: int, noise: float) -> None:
    generator = np.random.default_rng(4)

    def times() -> np.ndarray:
        return generator.lognormal(0, noise, runs) * (1 + 2 * (generator.random(runs) < 0.1))

    passed = [judged(*in_turns(times(), times()))["not_slower"].passed for _ in range(200)]
    assert sum(passed) >= 196


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
        "not_slower: 3.000 (at least 2.999 allowing for noise), allowed at most 1.05: the student is slower than the "
        "teacher, beyond the noise (meant so? --warn-only not-slower)",
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


def report(gates: Sequence[GateResult] = (), job: dict[str, object] | None = None) -> Report:
    """Return the report of a student that lost weights, and of its file not a byte."""
    return Report(
        status="passed",
        exit_code=0,
        started="2026-01-01T00:00:00+00:00",
        seconds=1,
        tool=Tool(version="1", onnx=None, onnxruntime=None, torch=None),
        command="",
        job=job or {},
        seed=0,
        device="cpu",
        files={},
        teacher=figures(),
        student=figures(1000, 50),
        fidelity={"samples": 1, "held_out": True, "outputs": ()},
        gates=tuple(gates),
    )


def test_a_saved_report_is_asked_again_what_it_was_asked() -> None:
    limits = Gate(max_latency_ratio=2)
    assert rejudge(report(), limits).exit_code == 0
    strict = rejudge(report(), Gate(max_latency_ratio=2, strict=True))
    assert strict.exit_code == 3 and [line.partition(":")[0] for line in strict.reasons] == ["smaller"]
    assert rejudge(report(strict.gates), limits).exit_code == 3
    assert rejudge(report(strict.gates), Gate(max_latency_ratio=2, warn_only=("smaller",))).exit_code == 0


def test_what_a_job_only_warned_of_rejects_no_saved_report() -> None:
    """A passed job of pattern 2:4 was rejected by `gate` under the very limits that it had passed."""
    limits = Gate(max_latency_ratio=2)
    passed = judge(figures(), figures(1000, 50), None, of_a_job(limits, "2:4"))
    assert verdict(passed)["exit_code"] == 0

    again = rejudge(report(passed), limits)

    assert again.exit_code == 0 and list(again.gates) == passed
    # A limit of one's own is judged as this gate says, whatever the saved one said.
    own = judge(figures(), figures(1000, 50), None, Gate(max_latency_ratio=0.5, warn_only=("max_latency_ratio",)))
    assert rejudge(report(own), Gate(max_latency_ratio=0.5)).exit_code == 3


def test_the_limits_of_a_report_can_be_judged_in_another_way() -> None:
    gate = of_a_job(Gate(max_latency_ratio=2, confidence=0.9, warn_only=("max_latency_ratio",)), "2:4")
    saved = report(judge(figures(), figures(1000, 50), None, gate), job={"gate": {"confidence": 0.9}})

    same, other = softened(saved, Gate()), softened(saved, Gate(confidence=0.8, warn_only=("removed",)))

    assert set(same.warn_only) == set(gate.warn_only)
    assert replace(same, warn_only=()) == replace(gate, warn_only=())
    assert set(other.warn_only) == {*gate.warn_only, "removed"} and other.confidence == 0.8
    assert softened(report(job={"gate": "max_drop"}), Gate()) == Gate()


def test_counts_are_shown_whole() -> None:
    result = judged(figures(12345), figures(345, 50))["smaller"]
    assert gate_line(result) == "smaller: 12,000 bytes, allowed at least 1 bytes"


@pytest.mark.parametrize(("structure", "level"), [("channel", "fail"), ("element", "fail"), ("2:4", "warn")])
def test_a_pattern_is_not_asked_to_shrink_the_file(structure: str, level: str) -> None:
    """Its zeros are stored like other weights; what reads the pattern gains elsewhere."""
    found = {result.name: result for result in judge(figures(), figures(), None, of_a_job(Gate(), structure))}

    assert not found["smaller"].passed and found["smaller"].level == level
    assert found["removed"].level == "fail"
