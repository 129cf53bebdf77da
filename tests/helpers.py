"""The asserts that everybody uses."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from xdonnx.model import differences, interface
from xdonnx.runtime import answer, open_session


def same_answers(
    first: onnx.ModelProto, second: onnx.ModelProto, inputs: Mapping[str, np.ndarray], *, tolerance: float = 1e-5
) -> None:
    """Assert that two models answer alike in onnxruntime, relative to the largest value of each output.

    Outputs below 0.01 are held to the absolute gap that 0.01 allows: onnxruntime's Sigmoid is inexact near zero.
    """
    ours, theirs = (answer(open_session(model), inputs) for model in (first, second))
    assert ours.keys() == theirs.keys()
    for name, expected in ours.items():
        found = theirs[name]
        assert expected.shape == found.shape, f"{name}: {expected.shape} and {found.shape}"
        scale = max(float(np.abs(expected).max()), 1e-2)
        gap = float(np.abs(expected - found).max()) / scale
        assert gap <= tolerance, f"{name} differs by {gap:.1e} of its largest value"


def same_interface(first: onnx.ModelProto, second: onnx.ModelProto) -> None:
    """Assert that callers cannot tell the two models apart before they run them."""
    assert differences(interface(first), interface(second)) == []
