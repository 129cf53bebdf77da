"""What `verify` measures on the samples that fitted, and what it makes of that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

from xdonnx.gate import Gate
from xdonnx.report import Report
from xdonnx.verification import verify

LINEAR = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,12] x) => (float[N,5] y) { y = MatMul (x, w) }"""
FIXED = LINEAR.replace("[N,", "[4,")


def samples(count: int, seed: int) -> tiny.Shots:
    return tiny.Shots({"x": np.random.default_rng(seed).normal(size=(count, 12)).astype(np.float32)})


@pytest.fixture
def pair(tmp_path: Path):
    """Return what judges a student of other weights, by samples of its own, after a fit on others."""

    def judged(student: np.ndarray, fitted: tiny.Shots | None, *, text: str = LINEAR, **how) -> Report:
        paths = [
            tiny.saved(tiny.with_weights(text, {"w": weight.astype(np.float32)}), tmp_path / f"{name}.onnx")
            for name, weight in (("teacher", TEACHER), ("student", student))
        ]
        return verify(*paths, samples(200, 1), how.pop("gate", Gate()), fitted=fitted, seconds=0, **how)

    return judged


TEACHER = np.random.default_rng(0).normal(size=(12, 5))


def learned_by_heart(fitted: tiny.Shots, slip: float = 0.0) -> np.ndarray:
    """Return weights that answer these samples as the teacher does, but for a slip, and others at random."""
    generator = np.random.default_rng(2)
    _, _, basis = np.linalg.svd(fitted.inputs["x"], full_matrices=True)
    blind = basis[len(fitted) :]
    return TEACHER * (1 + slip) + blind.T @ blind @ generator.normal(size=TEACHER.shape)


def test_the_error_on_samples_that_fitted_stands_beside_that_on_others(pair) -> None:
    fitted = samples(8, 3)
    student = TEACHER + 0.1 * np.random.default_rng(4).normal(size=TEACHER.shape)

    fidelity = pair(student, fitted).fidelity

    ours, theirs = (fitted.inputs["x"] @ weight for weight in (TEACHER, student))
    assert fidelity.fit_error == pytest.approx(np.linalg.norm(theirs - ours) / np.linalg.norm(ours), rel=1e-4)
    assert fidelity.outputs[0].relative_l2 != pytest.approx(fidelity.fit_error, rel=1e-3)
    assert fidelity.samples == 200


def test_a_student_that_learned_its_samples_by_heart_is_warned_of(pair) -> None:
    fitted = samples(6, 3)

    report = pair(learned_by_heart(fitted, slip=0.01), fitted)

    assert report.fidelity.fit_error == pytest.approx(0.01, rel=1e-3)
    (warning,) = [text for text in report.warnings if text.startswith("overfitted")]
    error = report.fidelity.outputs[0].relative_l2
    assert f"is 0.0100 on samples that fitted and {error:.4f} on 200 held-out samples" in warning
    assert "more varied samples" in warning


def test_a_student_as_good_on_new_samples_is_not(pair) -> None:
    student = TEACHER + 0.1 * np.random.default_rng(4).normal(size=TEACHER.shape)
    assert not any("overfitted" in text for text in pair(student, samples(20, 3)).warnings)
    assert not any("overfitted" in text for text in pair(TEACHER, samples(20, 3)).warnings)


def test_errors_too_small_to_matter_are_not_warned_of(pair) -> None:
    fitted = samples(6, 3)
    student = TEACHER + 0.04 * (learned_by_heart(fitted) - TEACHER)

    report = pair(student, fitted)

    assert report.fidelity.fit_error < 1e-6 < 0.02 < report.fidelity.outputs[0].relative_l2 < 0.05
    assert not any("overfitted" in text for text in report.warnings)


def test_an_error_that_few_samples_cannot_tell_from_that_of_the_fit_is_not_warned_of(pair, tmp_path: Path) -> None:
    """Thrice the error is a warning where it is sure: the interval's near end is what counts."""
    fitted = samples(6, 3)
    many = pair(learned_by_heart(fitted, slip=0.24), fitted)
    paths = tmp_path / "teacher.onnx", tmp_path / "student.onnx"

    few = verify(*paths, samples(3, 9), Gate(), fitted=fitted, seconds=0, confidence=0.999)

    (one,), (other,) = many.fidelity.outputs, few.fidelity.outputs
    assert one.low > 3 * 0.24 and any("overfitted" in text for text in many.warnings)
    assert other.relative_l2 > 3 * 0.24 > other.low and not any("overfitted" in text for text in few.warnings)


def test_no_sample_that_fitted_no_fit_error(pair) -> None:
    assert pair(TEACHER, None).fidelity.fit_error is None
    # Three do not fill a batch of four; the judging samples do.
    assert pair(TEACHER, samples(3, 3), text=FIXED).fidelity.fit_error is None
    assert pair(TEACHER, samples(4, 3), text=FIXED).fidelity.fit_error == 0.0


def test_of_many_samples_that_fitted_some_from_all_over_are_looked_at(pair) -> None:
    fitted = samples(640, 3)
    student = TEACHER + 0.1 * np.random.default_rng(4).normal(size=TEACHER.shape)

    found = pair(student, fitted).fidelity.fit_error

    ours, theirs = (fitted.inputs["x"][::10] @ weight for weight in (TEACHER, student))
    assert found == pytest.approx(np.linalg.norm(theirs - ours) / np.linalg.norm(ours), rel=1e-4)
