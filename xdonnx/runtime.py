"""onnxruntime sessions: the judge of every answer, on the device that was asked for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from xdonnx.errors import MachineError, ModelError, XdonnxError
from xdonnx.events import legible

Arrays = dict[str, np.ndarray]


def providers(device: str = "cpu") -> list[str | tuple[str, dict[str, str]]]:
    """Return the onnxruntime providers for 'cpu' or 'cuda[:n]', fastest first.

    The CUDA provider is only named when a GPU is asked for: onnxruntime-gpu lists it on machines without one
    too, and every session would then warn.
    """
    if device.startswith("cuda") and "CUDAExecutionProvider" in ort.get_available_providers():
        if hasattr(ort, "preload_dlls"):
            # It prints what it cannot load; stdout belongs to results.
            with contextlib.redirect_stdout(sys.stderr):
                ort.preload_dlls()
        number = device.partition(":")[2] or "0"
        return [("CUDAExecutionProvider", {"device_id": number}), "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]


def open_session(
    model: str | Path | onnx.ModelProto,
    *,
    device: str = "cpu",
    threads: int = 0,
    optimize: bool = True,
    spin: bool = True,
) -> ort.InferenceSession:
    """Open a model in onnxruntime.

    Parameters
    ----------
    model : path or ModelProto
        A path is opened as it lies on disk, external data included.
    device : str, default='cpu'
        'cpu' or 'cuda[:n]'.
    threads : int, default=0
        Threads within an operator; 0 lets onnxruntime choose.
    optimize : bool, default=True
        Whether onnxruntime may fuse nodes; off when every node's own answer is wanted.
    spin : bool, default=True
        Whether threads go on spinning between runs; off where sessions are timed side by side, or the threads
        of one take the cores from the other.

    Raises
    ------
    ModelError
        onnxruntime cannot run the model.
    MachineError
        Out of memory.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not spin:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    name = f"'{model}'" if isinstance(model, (str, Path)) else "the model"
    try:
        if isinstance(model, (str, Path)) and legible(str(model)) != str(model):
            model = onnx.load(model)  # a name that is not UTF-8 onnxruntime does not take
        source = str(model) if isinstance(model, (str, Path)) else model.SerializeToString()
        return ort.InferenceSession(source, options, providers=providers(device))
    except Exception as error:  # onnxruntime's exceptions share no other parent
        raise _failure(error, f"onnxruntime cannot run {name}.") from error


def answer(
    session: ort.InferenceSession, feeds: Mapping[str, np.ndarray], names: Sequence[str] | None = None
) -> Arrays:
    """Run one batch and return {output: array}; raises ModelError, or MachineError where memory is short."""
    wanted = list(names) if names is not None else [output.name for output in session.get_outputs()]
    try:
        found: list[Any] = session.run(wanted, dict(feeds))
    except Exception as error:  # onnxruntime's exceptions share no other parent
        raise _failure(error, "onnxruntime failed while running the model.") from error
    return dict(zip(wanted, found, strict=True))


def answer_all(session: ort.InferenceSession, inputs: Mapping[str, np.ndarray], *, batch: int) -> Arrays:
    """Run all rows, `batch` at a time, and return {output: rows joined along axis 0}."""
    rows = len(next(iter(inputs.values())))
    parts = [
        answer(session, {name: rowset[start : start + batch] for name, rowset in inputs.items()})
        for start in range(0, rows, batch)
    ]
    return {name: np.concatenate([np.atleast_1d(part[name]) for part in parts]) for name in parts[0]}


def _failure(error: Exception, what: str) -> XdonnxError:
    """Tell the machine's fault, a full memory, from the model's."""
    reason = _reason(error)
    # onnxruntime has no exception of its own for this; the words are its arena's, CUDA's and C++'s.
    scarce = ("Failed to allocate memory", "out of memory", "bad_alloc", "bad allocation")
    if isinstance(error, MemoryError) or any(words in str(error) for words in scarce):
        return MachineError(f"{what}\n  Out of memory: {reason}")
    return ModelError(f"{what}\n  {reason}")


def _reason(error: Exception) -> str:
    # "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find ..." -> from the third field on
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text.split(" : ", 2)[-1]
