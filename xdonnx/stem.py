"""What a model makes of images: its answers, and what reaches its first BatchNormalization."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

from xdonnx.errors import ModelError
from xdonnx.model import Port
from xdonnx.runtime import answer, open_session

Array = NDArray[Any]

# Above this many images at once nothing gets faster.
_BATCH = 16
# Convolutions between the input and a BatchNormalization that still counts as near it.
_NEAR = 2


def log_probabilities(session: ort.InferenceSession, port: Port, values: Array) -> Array | None:
    """Return the log-probabilities of all images, (n, classes); None where no output classifies."""
    answers = _run(session, port, values)
    for scores in answers:
        if scores is None or scores.dtype.kind != "f" or scores.ndim not in (2, 4) or scores.shape[1] < 2:
            continue
        if scores.shape[2:] not in ((), (1, 1)) or not np.isfinite(scores).all():
            continue
        flat = scores.reshape(len(scores), -1).astype(np.float64)
        if flat.min() >= 0 and abs(flat.sum(1) - 1).max() < 1e-2:
            return np.asarray(np.log(np.maximum(flat, 1e-45)))
        shifted = flat - flat.max(1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
    return None


def _run(session: ort.InferenceSession, port: Port, values: Array) -> list[Array | None]:
    """Return every output of all images, None for one that does not count them, as the detections of a detector.

    In the graph's own batches, the last one filled up.
    """
    fixed = port.shape[0] if port.shape and isinstance(port.shape[0], int) and port.shape[0] > 0 else None
    batch = fixed or _BATCH
    try:
        found = _joined(_one(session, port, values[at : at + batch], fixed) for at in range(0, len(values), batch))
    except ModelError:
        if fixed:
            raise
        found = [None]
    if fixed or any(output is not None for output in found):
        return found
    # Some exports declare the batch free and reshape to one.
    return _joined(_one(session, port, values[row : row + 1], 1) for row in range(len(values)))


def _joined(parts: Iterable[list[Array | None]]) -> list[Array | None]:
    """Return each output's parts in one; None where one is missing, or their sizes depend on the image."""
    found: list[Array | None] = []
    for output in zip(*parts, strict=True):
        known = [part for part in output if part is not None]
        whole = len(known) == len(output) and len({part.shape[1:] for part in known}) == 1
        found.append(np.concatenate(known) if whole else None)
    return found


def _one(session: ort.InferenceSession, port: Port, values: Array, fixed: int | None) -> list[Array | None]:
    rows = len(values)
    fed = values if fixed is None else np.resize(values, (fixed, *values.shape[1:]))
    found: list[Array | None] = []
    for output in answer(session, {port.name: fed}).values():
        counts = isinstance(output, np.ndarray) and output.ndim > 0 and len(output) == len(fed)
        found.append(output[:rows] if counts else None)
    return found


@dataclass(frozen=True, eq=False)
class Stem:
    """The graph as far as its first BatchNormalization, and what that has seen in training, (channels,) each."""

    session: ort.InferenceSession
    port: Port
    mean: Array
    variance: Array

    def mismatch(self, values: Array) -> float | None:
        """Return how far what arrives is from that; None where its first axis does not count images."""
        (seen,) = _run(self.session, self.port, values)
        if seen is None:
            return None
        channels = np.moveaxis(seen, 1, 0).reshape(len(self.mean), -1).astype(np.float64)
        # Channels that never varied say nothing.
        live = self.variance > 1e-4 * self.variance.max()
        mean, variance = channels.mean(1)[live], channels.var(1)[live] + 1e-12
        trained = self.variance[live]
        away = (variance + (mean - self.mean[live]) ** 2) / trained
        return float((0.5 * (np.log(trained / variance) + away - 1)).mean())


def stem_of(proto: onnx.ModelProto, port: Port) -> Stem | None:
    """Return the part of the graph before its first BatchNormalization, where that is near the input."""
    made = {name: at for at, node in enumerate(proto.graph.node) for name in node.output}
    first = next((node for node in proto.graph.node if node.op_type == "BatchNormalization"), None)
    if first is None:
        return None
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    statistics = [weights.get(name) for name in first.input[3:5]]
    needed, read, todo = set[int](), set[str](), [first.input[0]]
    while todo:
        name = todo.pop()
        read.add(name)
        if name in made and made[name] not in needed:
            needed.add(made[name])
            todo += proto.graph.node[made[name]].input
    nodes = [proto.graph.node[at] for at in sorted(needed)]
    near = sum(node.op_type == "Conv" for node in nodes) <= _NEAR
    simple = not any(attribute.HasField("g") for node in nodes for attribute in node.attribute)
    if port.name not in read or not near or not simple or None in statistics:
        return None
    stem = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions)
    stem.graph.name = proto.graph.name or "stem"
    stem.graph.node.extend(nodes)
    stem.graph.initializer.extend(tensor for name, tensor in weights.items() if name in read)
    stem.graph.input.extend(value for value in proto.graph.input if value.name in read)
    stem.graph.output.append(onnx.ValueInfoProto(name=first.input[0]))
    mean, variance = (numpy_helper.to_array(tensor).astype(np.float64) for tensor in statistics if tensor is not None)
    try:
        return Stem(open_session(stem), port, mean, variance)
    except ModelError:
        return None
