"""How alike a student's layer is to a teacher's, channel by channel: in its weights and in what it puts out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, prod, sqrt
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir

from xdonnx.errors import ModelError, ShotsError
from xdonnx.graph import Net
from xdonnx.layers import Layer
from xdonnx.runtime import answer, open_session

Array = np.ndarray
# Positions of each sample whose outputs are compared.
EACH = 32
# Weights of this many elements are compared as a whole; larger ones by their outputs alone.
_LARGEST = 1 << 26
# A channel that varies less than this beside the layer's liveliest is silent.
_SILENT = 1e-6
# Cosines this close to 1 are those of equal filters in float32, and outweigh all else.
_ROUNDING, _EQUAL = 1e-5, 4.0
# By how much the likeness of channels in another order has to exceed that of channels in order, of at most 2.
_CLEARLY = 0.1
# Likeness at which a choice among so many says nothing is never put higher than this.
_MOST_BY_CHANCE = 0.95


@dataclass(frozen=True, eq=False)
class Likeness:
    """What speaks for a student's layer being a teacher's.

    Parameters
    ----------
    channels : (outputs,) int
        For each output channel of the student's layer the teacher's that it is.
    weights, activations : float or None
        Mean cosine of the weights of these channels, and mean correlation of what they put out; both corrected for
        chance, so that 0 is what unrelated layers show and 1 is identity. None where there is nothing to compare.
    """

    channels: Array
    weights: float | None
    activations: float | None

    @property
    def confidence(self) -> float:
        """The better of the two: fitted weights may be far from the teacher's, and so may outputs after pruning."""
        return max(self.weights or 0.0, self.activations or 0.0)

    @property
    def by(self) -> Literal["weights", "activations"]:
        """Which of the two that was."""
        return "weights" if (self.weights or 0.0) >= (self.activations or 0.0) else "activations"


def outputs_of(net: Net, inputs: Mapping[str, Array], batch: int = 8) -> dict[str, Array]:
    """Return what every layer puts out at some positions, (channels, samples, positions), in float32.

    Every channel has mean 0 and norm 1, or is zero throughout where it says nothing. Two nets with layers of the same
    spatial size are looked at in the same places.

    Raises
    ------
    ShotsError
        The samples do not fill one batch.
    ModelError
        A layer puts out what is not finite.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(ir.to_proto(net.model))
    declared = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in net.layers if name not in declared)
    session = open_session(copy, optimize=False)
    fixed = net.interface.batch
    size = fixed if fixed else batch
    count = len(next(iter(inputs.values())))
    if fixed and count < fixed:
        raise ShotsError(f"the graph takes {fixed} samples at once, and there are {count}.\n  Give more samples.")
    found: dict[str, list[Array]] = {name: [] for name in net.layers}
    for start in range(0, count - size + 1 if fixed else count, size):
        feed = {name: values[start : start + size] for name, values in inputs.items()}
        made = answer(session, feed, list(net.layers))
        for name, layer in net.layers.items():
            seen = _looked_at(layer, made[name])
            if not np.isfinite(seen).all():
                raise ModelError(
                    f"layer '{name}' puts out numbers that are not finite for these samples.\n"
                    "  Check the file, and --preset, --scale, --mean and --std."
                )
            found[name].append(seen)
    return {name: _standard(np.concatenate(parts, axis=1)) for name, parts in found.items()}


def _standard(values: Array) -> Array:
    values = values - values.mean((1, 2), keepdims=True)
    norm = np.sqrt((values**2).sum((1, 2), keepdims=True))
    scaled: Array = np.where(norm > _SILENT * max(float(norm.max()), 1e-30), values / np.maximum(norm, 1e-30), 0.0)
    return scaled


def _looked_at(layer: Layer, made: Array) -> Array:
    axis = 1 if layer.kernel else made.ndim - 1
    flat = np.moveaxis(made, axis, 0).reshape(made.shape[axis], len(made), -1)
    positions = flat.shape[2]
    places = np.unique(np.linspace(0, positions - 1, min(EACH, positions)).round().astype(np.int64))
    chosen: Array = flat[:, :, places].astype(np.float32)
    return chosen


def whole_weight(net: Net, row: Sequence[str]) -> Array | None:
    """Return the weight of the one layer that a row of linear layers comes to: (outputs, inputs, *kernel).

    Groups are spread out and dilations filled with zeros. None where it would be too large.
    """
    layers = [net.layers[name] for name in row]
    first = layers[0]
    total = _dense(net, first)
    stride = first.strides or ()
    for layer in layers[1:]:
        next_one = _dense(net, layer)
        if total is None or next_one is None:
            return None
        total = _after_another(total, next_one, stride)
        stride = tuple(a * b for a, b in zip(stride, layer.strides, strict=True))
    return total


def _dense(net: Net, layer: Layer) -> Array | None:
    weight = np.asarray(net.array(layer.weight), np.float64)
    if not layer.kernel:
        return weight.T if layer.transposed else weight
    groups, kernel = layer.groups, layer.kernel
    if layer.op == "ConvTranspose":
        blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).swapaxes(1, 2)
    else:
        blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    _, outputs, inputs = blocks.shape[:3]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, layer.dilations, strict=True)]
    if groups * outputs * groups * inputs * prod(reach) > _LARGEST:
        return None
    filled = np.zeros((groups, outputs, groups, inputs, *reach))
    within = tuple(slice(None, None, d) for d in layer.dilations)
    for at in range(groups):
        filled[at, :, at][(slice(None), slice(None), *within)] = blocks[at]
    return filled.reshape(groups * outputs, groups * inputs, *reach)


def _after_another(first: Array, second: Array, stride: Sequence[int]) -> Array | None:
    """Return the kernel of one convolution after another: its taps lie `stride` of the first apart."""
    if second.shape[1] != first.shape[0]:
        return None
    if not stride:
        product: Array = second @ first
        return product
    kernel = first.shape[2:]
    reach = [k + (m - 1) * s for k, m, s in zip(kernel, second.shape[2:], stride, strict=True)]
    if second.shape[0] * first.shape[1] * prod(reach) > _LARGEST:
        return None
    total = np.zeros((second.shape[0], first.shape[1], *reach))
    for tap in np.ndindex(*second.shape[2:]):
        where = tuple(slice(t * s, t * s + k) for t, s, k in zip(tap, stride, kernel, strict=True))
        total[(slice(None), slice(None), *where)] += np.tensordot(second[(slice(None), slice(None), *tap)], first, 1)
    return total


def alike(
    teacher: tuple[Array | None, Array],
    student: tuple[Array | None, Array],
    inputs: Array | None,
    known: Array | None,
) -> Likeness:
    """Compare two layers, and find which of the teacher's channels each of the student's is.

    Parameters
    ----------
    teacher, student : (weight, outputs)
        A weight as from :func:`whole_weight`, None where it cannot be compared; outputs as from :func:`outputs_of`.
    inputs : (student's inputs,) int, optional
        The teacher's input channel that each of the student's is, -1 where that is not known; None: nothing is known.
    known : (student's outputs,) int, optional
        Which channels the outputs are, where other layers that write the same channels have said so.
    """
    by_weight = _cosines(teacher[0], student[0], inputs)
    ours, theirs = teacher[1], student[1]
    by_output = _correlations(theirs, ours)
    # Half the samples on: what is left is what unrelated images show.
    by_chance = _correlations(np.roll(theirs, theirs.shape[1] // 2, axis=1), ours)
    rows = np.arange(len(theirs))
    free = known is None
    if known is None:
        both = by_output if by_weight is None else by_weight.cosines + by_output
        if by_weight is not None:
            # A filter that was kept as it is proves more than what it puts out behind others that were not.
            both = both + _EQUAL * (by_weight.cosines > 1 - _ROUNDING)
        known = assigned(both)
    chance = by_chance.max(1) if free else by_chance[rows, known]
    activations = _beyond_chance(by_output[rows, known], chance, np.asarray(theirs.any((1, 2))))
    weights = None
    if by_weight is not None:
        in_order = len(known) == len(ours) and bool((np.diff(known) > 0).all())
        among = len(ours) if free and not in_order else 1
        chosen = np.full(len(rows), sqrt(2 * log(max(among, 1)) / max(by_weight.length, 1)))
        # Cosines add up over hundreds of weights: what is little beyond chance is much evidence already.
        weights = sqrt(_beyond_chance(by_weight.cosines[rows, known], chosen, by_weight.alive))
    return Likeness(known, weights, activations if theirs.shape[1] > 1 else None)


def assigned(likeness: Array) -> Array:
    """Return which column each row is: those that make the sum largest, no column twice.

    Pruning keeps the order of channels, so columns in order are taken unless others are clearly more alike: where
    channels are alike among themselves or dead, the order is all there is to go by.
    """
    from scipy.optimize import linear_sum_assignment

    rows = np.arange(len(likeness))
    ordered = _in_order(likeness)
    free: Array = linear_sum_assignment(likeness, maximize=True)[1]
    gained = float((likeness[rows, free] - likeness[rows, ordered]).mean())
    return free if gained > _CLEARLY else ordered


def _in_order(likeness: Array) -> Array:
    """Return the rising columns that make the sum largest, by dynamic programming over the rows."""
    count, columns = likeness.shape
    best = np.zeros(columns + 1)
    reached = []
    for row in likeness:
        # Of the best sums that end at or before each column, this row's own column last.
        own = best[:-1] + row
        best = np.concatenate([[-np.inf], np.maximum.accumulate(own)])
        reached.append(own)
    found, end = np.zeros(count, np.int64), columns
    for at in range(count - 1, -1, -1):
        found[at] = int(np.argmax(reached[at][:end]))
        end = int(found[at])
    return found


@dataclass(frozen=True, eq=False)
class _Cosines:
    cosines: Array
    alive: Array
    length: int


def _cosines(teacher: Array | None, student: Array | None, inputs: Array | None) -> _Cosines | None:
    """Return the cosine of every student's filter with every teacher's, over the inputs that both have."""
    if teacher is None or student is None or teacher.shape[2:] != student.shape[2:]:
        return None
    if inputs is None:
        if teacher.shape[1] != student.shape[1]:
            return None
        inputs = np.arange(student.shape[1])
    both = inputs >= 0
    if not both.any():
        return None
    ours = teacher[:, inputs[both]].reshape(len(teacher), -1)
    theirs = student[:, both].reshape(len(student), -1)
    norms = np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1)
    cosines = theirs @ ours.T / np.maximum(np.outer(norms[1], norms[0]), 1e-30)
    return _Cosines(cosines, norms[1] > 0, int(np.count_nonzero(np.any(ours != 0, axis=0))))


def _correlations(theirs: Array, ours: Array) -> Array:
    found: Array = theirs.reshape(len(theirs), -1) @ ours.reshape(len(ours), -1).T
    return found


def _beyond_chance(found: Array, chance: Array, alive: Array) -> float:
    """Return the mean likeness of the channels that say something, as a share of what chance leaves room for."""
    if not alive.any():
        return 0.0
    mean, least = float(found[alive].mean()), min(max(float(chance[alive].mean()), 0.0), _MOST_BY_CHANCE)
    return min(max((mean - least) / (1 - least), 0.0), 1.0)
