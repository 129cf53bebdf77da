"""Gate a model where other code is gated: with pytest. Copy to your tests; MODELS names the folder of the models.

MODELS=models pytest test_model.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import xdonnx

MODELS = Path(os.environ.get("MODELS", "models"))


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (inputs, labels) as your own evaluation does; a torch DataLoader serves as well."""
    with np.load(MODELS / "held_out.npz") as held:
        images, labels = held["images"], held["labels"]
    for start in range(0, len(images), 64):
        yield images[start : start + 64, None].astype(np.float32) / 255, labels[start : start + 64]


@pytest.fixture(scope="session")
def report() -> xdonnx.Report:
    """Return what is measured once and judged by every test."""
    return xdonnx.verify(MODELS / "teacher.onnx", MODELS / "student.onnx", batches())


def test_student_loses_at_most_a_point(report: xdonnx.Report) -> None:
    """Judge the accuracy, with the reason in the message."""
    judged = xdonnx.rejudge(report, xdonnx.Gate(max_drop=1))
    assert judged.status == "passed", judged.reasons


def test_student_is_smaller(report: xdonnx.Report) -> None:
    """Judge the size; any figure of the report will do."""
    assert report.teacher and report.student
    assert report.student.bytes < 0.7 * report.teacher.bytes


def test_callers_see_no_difference(report: xdonnx.Report) -> None:
    """Judge names, types, shapes and the opset."""
    assert report.interface and report.interface.inputs == report.interface.outputs == "same"
