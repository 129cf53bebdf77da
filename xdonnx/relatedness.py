"""How related images look to what a teacher was trained on, by the teacher alone: no samples of its task are needed.

Every indicator is lower for what looks more familiar:
  * of the answers, as probabilities p: mp = 1 - max p, h = entropy of p, and t1000 = 1 - max p at temperature 1000;
  * of every BatchNormalization, whose outputs have mean 0 and deviation 1 in each channel on training data once scale
    and shift are taken back, over the positions of one image: dms = mean of (channel mean)^2, dss = mean of (channel
    deviation - 1)^2, dss_ext = share of channels whose variance chance does not explain, aos = mean square;
  * of the input u of the last linear layer and its row w of the class predicted: norm = -|u|, act = -u.w, proj =
    -u.w / |w|, ang = 1 - cos(u, w).
Each is standardised by what uniform noise scores, and the sum is the score. BatchNormalization is looked at in the file
as it is, before it is folded away.

References
----------
.. [1] Begon, Geurts, "Sample-free white-box out-of-distribution detection for deep learning", CVPR Workshops 2021.
.. [2] Liang, Li, Srikant, "Enhancing the Reliability of Out-of-distribution Image Detection in Neural Networks", ICLR
   2018 (t1000 is ODIN without its perturbation). arXiv:1706.02690
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from xdonnx.errors import ModelError
from xdonnx.fidelity import classifies
from xdonnx.graph import infer_shapes
from xdonnx.model import interface
from xdonnx.runtime import answer, open_session

Array = NDArray[Any]

# Of the definitions above: scores of another version are others.
VERSION = 1
LOGITS = ("mp", "h", "t1000")
NORMS = ("dms", "dss", "dss_ext", "aos")
LATENT = ("norm", "act", "proj", "ang")
TEMPERATURE = 1000.0
# Chance of a variance outside the band of dss_ext, on each side, as a normal quantile: five per cent.
_BAND = 1.6449
# Of the deviation over the images: noise is taken to vary as much at least. And what stands for no number.
_STEADY, _HUGE = 0.01, 1e6
# Of the largest scale of a normalization: what a channel with less carries is rounding.
_LEAST_SCALE = 1e-3
# What turns scores into shares, or hands them on.
_AFTER = frozenset({"Softmax", "LogSoftmax", "Identity", "Flatten", "Reshape", "Squeeze"})


@dataclass(frozen=True, eq=False)
class _Norm:
    """A BatchNormalization: names of its output's mean and mean square, and what takes scale and shift back."""

    mean: str
    square: str
    scale: Array
    shift: Array
    positions: int


@dataclass(frozen=True, eq=False)
class Gauge:
    """A teacher whose indicators can be read.

    Parameters
    ----------
    names : tuple of str
        The indicators that this teacher has.
    """

    session: ort.InferenceSession
    names: tuple[str, ...]
    batch: int | None
    scores: str | None
    features: tuple[str, Array] | None
    norms: tuple[_Norm, ...]

    def __call__(self, feed: Mapping[str, Array]) -> Array:
        """Return the indicators of some samples, (n, len(names)) float64."""
        rows = len(next(iter(feed.values())))
        size = self.batch or rows
        parts = []
        if not self.names:
            return np.zeros((rows, 0))
        for start in range(0, rows, size):
            part = {name: values[start : start + size] for name, values in feed.items()}
            lacking = size - len(next(iter(part.values())))
            if lacking:
                # A graph of fixed batch takes no less.
                part = {name: np.concatenate([v, np.repeat(v[-1:], lacking, 0)]) for name, v in part.items()}
            parts.append(self._of_a_run(part)[: size - lacking])
        return np.concatenate(parts)

    def _of_a_run(self, feed: Mapping[str, Array]) -> Array:
        wanted = [self.scores, self.features and self.features[0], *(n for m in self.norms for n in (m.mean, m.square))]
        found = answer(self.session, feed, [name for name in wanted if name])
        rows = len(next(iter(feed.values())))
        columns: list[Array] = []
        if self.scores is not None:
            logits = found[self.scores].reshape(rows, -1).astype(np.float64)
            columns += of_logits(logits)
            if self.features is not None:
                name, weights = self.features
                columns += of_latent(found[name].reshape(rows, -1).astype(np.float64), weights[logits.argmax(1)])
        if self.norms:
            columns += of_norms([_whitened(norm, found) for norm in self.norms])
        return np.stack(columns, axis=1)


def open_gauge(proto: onnx.ModelProto, sample: Mapping[str, Array], *, device: str = "cpu") -> Gauge:
    """Open a teacher for its indicators.

    Parameters
    ----------
    proto : onnx.ModelProto
        From :func:`xdonnx.model.read_proto`; not changed.
    sample : {graph input: (n, ...)}
        As many samples as the graph takes at once, or more.
    device : str, default='cpu'
        As of :func:`xdonnx.runtime.open_session`.

    Raises
    ------
    ModelError, MachineError
        The model cannot be run.
    """
    ports = interface(proto).inputs
    batch = next((port.shape[0] for port in ports if port.shape and isinstance(port.shape[0], int)), None)
    rows = batch or 1
    fed = {name: values[:rows] for name, values in sample.items()}
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    constants = _constants(proto)
    try:
        shapes = infer_shapes(proto, {name: values.shape for name, values in fed.items()})
    except ModelError:
        shapes = {}  # onnxruntime may still run it; what shapes are not known is left out
    norms = tuple(_norms(copy, constants, shapes))
    scores = _scores(proto, fed, rows)
    features = None if scores is None else _features(proto, scores, constants)
    declared = {value.name for value in copy.graph.output}
    extra = [scores, features and features[0]]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra if name and name not in declared)
    gauge = Gauge(open_session(copy, device=device), (), batch, scores, features, norms)
    if features is not None:
        width = answer(gauge.session, fed, [features[0]])[features[0]].size // rows
        if width != features[1].shape[1]:
            features = None
    names = ((*LOGITS, *(LATENT if features else ())) if scores else ()) + (NORMS if norms else ())
    return Gauge(gauge.session, names, batch, scores, features, norms)


def of_logits(logits: Array) -> list[Array]:
    """Return mp, h and t1000 of answers before the softmax, (n, classes)."""
    log = _log_softmax(logits)
    chances = np.exp(log)
    tempered = np.exp(_log_softmax(logits / TEMPERATURE))
    return [1 - chances.max(1), -(chances * log).sum(1), 1 - tempered.max(1)]


def of_latent(inputs: Array, rows: Array) -> list[Array]:
    """Return norm, act, proj and ang of the inputs of a linear layer, (n, d), and its rows of the classes predicted."""
    along = (inputs * rows).sum(1)
    size, length = np.linalg.norm(inputs, axis=1), np.linalg.norm(rows, axis=1)
    return [-size, -along, -along / np.maximum(length, 1e-30), 1 - along / np.maximum(size * length, 1e-30)]


def of_norms(layers: Sequence[tuple[Array, Array, int]]) -> list[Array]:
    """Return dms, dss, dss_ext and aos, each the mean over layers.

    Parameters
    ----------
    layers : sequence of (mean, square, positions)
        Of each layer the mean and the mean square in every channel, (n, channels), without scale and shift.
    """
    found = []
    for mean, square, positions in layers:
        variance = np.maximum(square - mean**2, 0)
        low, high = variance_band(positions)
        outside = (variance < low) | (variance > high)
        found.append([(mean**2).mean(1), ((np.sqrt(variance) - 1) ** 2).mean(1), outside.mean(1), square.mean(1)])
    # A layer whose channels all lack a scale says nothing.
    found = [layer for layer in found if all(np.isfinite(part).all() for part in layer)] or found
    return [np.mean([layer[at] for layer in found], axis=0) for at in range(len(NORMS))]


def variance_band(count: int) -> tuple[float, float]:
    """Return where the variance of `count` independent standard normal numbers lies nine times in ten.

    By the cube root of a chi-square variable, which is nearly normal (Wilson, Hilferty, 1931).
    """
    share = 2 / (9 * max(1, count - 1))
    low, high = ((1 - share + side * _BAND * share**0.5) ** 3 for side in (-1, 1))
    return max(0.0, low), high


def standardised(found: Array, noise: Array) -> Array:
    """Return the sum of indicators, each standardised by what noise scores; then of mean 0 and deviation 1.

    Parameters
    ----------
    found : (n, k)
        Indicators of the images.
    noise : (m, k)
        Of uniform noise.
    """
    found, noise = (np.nan_to_num(one, nan=_HUGE, posinf=_HUGE, neginf=-_HUGE) for one in (found, noise))
    mean, spread = noise.mean(0), noise.std(0)
    # An indicator that noise hardly moves must not be all that counts.
    spread = np.maximum(spread, _STEADY * found.std(0))
    spread[spread == 0] = 1
    total = ((found - mean) / spread).sum(1)
    scores: Array = (total - total.mean()) / (total.std() or 1)
    return scores


def noise_like(samples: Mapping[str, Array], count: int, seed: int = 0) -> dict[str, Array]:
    """Return uniform noise in the range of some samples, channel by channel where these are images."""
    generator = np.random.default_rng(seed)
    made = {}
    for name, values in samples.items():
        # The axis of channels: the first or the last after that of the samples.
        own = next((axis for axis in (1, 3) if values.ndim == 4 and values.shape[axis] in (1, 3)), 0)
        axes = tuple(axis for axis in range(values.ndim) if axis != own or not own)
        low, high = values.min(axes or None, keepdims=True), values.max(axes or None, keepdims=True)
        uniform = generator.uniform(low, high, (count, *values.shape[1:]))
        made[name] = (np.round(uniform) if values.dtype.kind in "iu" else uniform).astype(values.dtype)
    return made


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return found


def _whitened(norm: _Norm, found: Mapping[str, Array]) -> tuple[Array, Array, int]:
    """Return mean and mean square of a normalization's output without its scale and shift."""
    mean, square = (found[name].reshape(len(found[name]), -1).astype(np.float64) for name in (norm.mean, norm.square))
    kept = np.abs(norm.scale) > _LEAST_SCALE * np.abs(norm.scale).max()
    g, b, mean, square = norm.scale[kept], norm.shift[kept], mean[:, kept], square[:, kept]
    return (mean - b) / g, (square - 2 * b * mean + b**2) / g**2, norm.positions


def _constants(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    found = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return found


def _norms(
    copy: onnx.ModelProto, constants: Mapping[str, onnx.TensorProto], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[_Norm]:
    """Have the graph put out mean and mean square of every normalization of images, and yield what they are called."""
    taken = {name for node in copy.graph.node for name in (*node.input, *node.output)}
    for node in list(copy.graph.node):
        training = any(a.name == "training_mode" and a.i for a in node.attribute)
        if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx") or training:
            continue
        shape = shapes.get(node.output[0], ())
        if len(shape) < 3 or prod(shape[2:]) < 2 or not {node.input[1], node.input[2]} <= set(constants):
            continue
        scale, shift = (numpy_helper.to_array(constants[name]).astype(np.float64) for name in node.input[1:3])
        if not scale.any():
            continue
        mean, raised, square = (_free(f"{node.output[0]}/{what}", taken) for what in ("mean", "raised", "square"))
        # Averaged in the graph: the values themselves of all layers would fill the memory.
        # In float32, since in half precision a square overflows from 256 on.
        wide = _free(f"{node.output[0]}/wide", taken)
        copy.graph.node.extend(
            [
                helper.make_node("Cast", [node.output[0]], [wide], to=onnx.TensorProto.FLOAT),
                helper.make_node("GlobalAveragePool", [wide], [mean]),
                helper.make_node("Mul", [wide, wide], [raised]),
                helper.make_node("GlobalAveragePool", [raised], [square]),
            ]
        )
        copy.graph.output.extend([onnx.ValueInfoProto(name=mean), onnx.ValueInfoProto(name=square)])
        yield _Norm(mean, square, scale, shift, prod(shape[2:]))


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _scores(proto: onnx.ModelProto, fed: Mapping[str, Array], rows: int) -> str | None:
    """Return the value that classifies, before any softmax: that behind the first output that is a row of scores."""
    found = answer(open_session(proto), fed)
    for port in proto.graph.output:
        if classifies(found[port.name], rows):
            return _before(proto, port.name, frozenset({"Softmax", "LogSoftmax", "Identity"}))
    return None


def _before(proto: onnx.ModelProto, name: str, passed: frozenset[str]) -> str:
    makers = {output: node for node in proto.graph.node for output in node.output}
    while name in makers and makers[name].op_type in passed:
        name = makers[name].input[0]
    return name


def _features(
    proto: onnx.ModelProto, scores: str, constants: Mapping[str, onnx.TensorProto]
) -> tuple[str, Array] | None:
    """Return what the last linear layer reads and its weights (classes, d); None where scores come from none."""
    makers = {output: node for node in proto.graph.node for output in node.output}
    node = makers.get(_before(proto, scores, _AFTER))
    if node is not None and node.op_type == "Add":
        inner = [makers[name] for name in node.input if name in makers and name not in constants]
        node = inner[0] if len(inner) == 1 and len(constants.keys() & set(node.input)) == 1 else None
    if node is None or node.op_type not in ("Gemm", "MatMul", "Conv") or node.input[1] not in constants:
        return None
    weights = numpy_helper.to_array(constants[node.input[1]]).astype(np.float64)
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Conv":
        flat = weights.ndim == 4 and weights.shape[2:] == (1, 1) and attributes.get("group", 1) == 1
        return (node.input[0], weights[:, :, 0, 0]) if flat else None
    if weights.ndim != 2 or attributes.get("transA", 0):
        return None
    return node.input[0], weights if attributes.get("transB", 0) else weights.T
