"""Two files of one student must answer alike: masked and cut, dense and sparse."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from xdonnx.errors import VerifyError
from xdonnx.events import Event, Log
from xdonnx.patch import store_sparse
from xdonnx.runtime import answer, open_session

# Masked and cut student may differ by this much of the largest value: only the order of float32 sums changes.
SAME = 1e-3


def check_same(
    silenced: onnx.ModelProto,
    student: onnx.ModelProto,
    inputs: Mapping[str, np.ndarray],
    *,
    what: str = "the cut student differs from the masked one",
) -> None:
    """Raise VerifyError unless masked and cut student answer alike: else removal touched what it must not."""
    expected, found = (answer(open_session(model), inputs) for model in (silenced, student))
    for name, array in expected.items():
        if array.dtype.kind != "f":
            continue
        # Below 0.01 the absolute gap counts: onnxruntime's Sigmoid is inexact near zero.
        # Where the one is no number, as the logarithm of noise, there is nothing to compare.
        real = np.isfinite(array)
        scale = max(float(np.abs(array).max(initial=0.0, where=real)), 1e-2)
        gap = float(np.abs(array[real] - found[name][real]).max(initial=0.0)) / scale
        if not gap <= (10 * SAME if array.dtype == np.float16 else SAME):
            raise VerifyError(
                f"output '{name}' of {what} by {gap:.1e} of its largest value.\n"
                "  This is a defect of xdonnx: please report it with the model's operators (xdonnx inspect)."
            )


def keep_sparse(student: onnx.ModelProto, inputs: Mapping[str, np.ndarray], log: Log) -> None:
    """Store zeros sparsely where onnxruntime loads that and answers alike; dense otherwise."""
    sparse = onnx.ModelProto()
    sparse.CopyFrom(student)
    if not store_sparse(sparse):
        return
    try:
        check_same(student, sparse, inputs)
    except Exception as error:  # whatever onnxruntime says of a sparse file, the dense one is right
        log(Event("cut", f"weights stay dense, onnxruntime does not take them sparse: {error}", level="warning"))
        return
    student.CopyFrom(sparse)
