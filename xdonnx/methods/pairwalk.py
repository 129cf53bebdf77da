"""Walk through two different graphs, a teacher's and a student's, and stop where the two were matched.

The student runs step by step, all samples at once, with the weights that the stops before gave it. The teacher is run
ahead of it as far as the next stop has to see, and forgets what no later stop asks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from xdonnx.columns import Geometry
from xdonnx.convert import Program, Step, call, geometry, layer_tensors, run_layer, stored
from xdonnx.events import Event, Log
from xdonnx.graph import Net
from xdonnx.layers import Layer
from xdonnx.matching import Pair
from xdonnx.shelf import Chunks
from xdonnx.walk import addends, chunked

Weights = tuple[Tensor, Tensor | None]
Affine = tuple[Tensor, Tensor]
"""Factor and constant of each channel, (outputs,) in float64."""

# Steps that are linear in each of their inputs, the divisor apart.
_AFFINE = frozenset({"Add", "Sub", "Mul", "Div", "BatchNormalization"})


@dataclass(frozen=True, eq=False)
class Meeting:
    """The last layer of the student's row, with what it reads, and the teacher's layer, with what it puts out.

    Parameters
    ----------
    pair : Pair
    layer, geometry
        The student's.
    weight, bias : Tensor, Tensor or None
        Its own as they are now, laid out as `layer_tensors` returns them.
    source : list of Tensor
        What it reads, chunk by chunk.
    target : list of Tensor
        What the layer should put out for both networks to go on alike: what the teacher's does, of the channels that
        the student has, in the student's order, by `scale` and `shift`.
    teacher : Layer
    teacher_source : list of Tensor
        What the teacher's layer reads.
    scale, shift : (outputs,) Tensor
        1 and 0 unless what constants do to the outputs behind the layer is not the same in both networks.
    beside : (teacher, student) lists of Tensor, optional
        What the outputs of both layers are added to, where that is known already and alike: the other branch of a
        residual block, of the channels that the student has.
    """

    pair: Pair
    layer: Layer
    geometry: Geometry
    weight: Tensor
    bias: Tensor | None
    source: Chunks
    target: Chunks
    teacher: Layer
    teacher_source: Chunks
    scale: Tensor
    shift: Tensor
    beside: tuple[Chunks, Chunks] | None = None

    def whole_target(self) -> Chunks:
        """Return the target and, where the output is added to something, what that lacks in the student."""
        if self.beside is None:
            return self.target
        return [y + t - s for y, t, s in zip(self.target, *self.beside, strict=True)]


Visit = Callable[[Meeting], Weights | None]


class _Ahead:
    """The teacher, run as far as somebody has to see."""

    def __init__(self, net: Net, program: Program, inputs: list[Mapping[str, np.ndarray]], asked: Counter[str]) -> None:
        self.net, self.program, self.asked = net, program, asked
        self.count, self.at = len(inputs), 0
        self.values = _start(program, inputs)

    def take(self, name: str) -> Chunks:
        """Return a value, for one of those who ask for it."""
        while name not in self.values:
            _run(self.net, self.program.steps[self.at], self.values, self.count, None)
            self.at += 1
            for read in (*self.program.steps[self.at - 1].inputs, *self.program.steps[self.at - 1].outputs):
                self._drop(read)
        self.asked[name] -= 1
        found = self.values[name]
        self._drop(name)
        return found

    def _drop(self, name: str) -> None:
        if name and self.asked[name] <= 0 and self.program.last_read.get(name, -1) < self.at:
            self.values.pop(name, None)


@torch.no_grad()
def meet(
    teacher: tuple[Net, Program],
    student: tuple[Net, Program],
    pairs: Mapping[str, Pair],
    inputs: Mapping[str, np.ndarray],
    visit: Visit,
    tensors: Mapping[str, np.ndarray],
    log: Log,
) -> None:
    """Run both networks on all samples, and let `visit` refit the student's layers in graph order.

    Parameters
    ----------
    teacher, student : (Net, Program)
    pairs : {last layer of the student's row: Pair}
    inputs : {graph input: (n, ...)}
    visit : callable
        Called at each pair; returns the layer's new weight and bias, None to keep its own.
    tensors : {initializer: array}
        The student's weights where they are no longer those of its file.
    log : callable
        Told of progress.
    """
    theirs, net = teacher[0], student[0]
    batches: list[Mapping[str, np.ndarray]] = list(chunked(theirs, inputs))
    asked = Counter(name for pair in pairs.values() for name in (pair.teacher, theirs.layers[pair.teacher].input))
    beside = _beside(teacher, student, pairs)
    asked.update(other for other, _ in beside.values())
    ahead = _Ahead(*teacher, batches, asked)
    program = student[1]
    values = _start(program, batches)
    done = 0
    for at, step in enumerate(program.steps):
        layer = step.layer
        if layer is None:
            _run(net, step, values, len(batches), None)
        else:
            weights = own_weights(net, layer, tensors, program.device)
            if layer.name in pairs:
                log(Event("fit", layer.name, done=done, total=len(pairs)))
                meeting = _meeting(ahead, pairs[layer.name], layer, weights, values[layer.input], student)
                if layer.name in beside:
                    other, own = beside[layer.name]
                    meeting = replace(meeting, beside=_alike(ahead.take(other), values[own], meeting))
                weights = visit(meeting) or weights
                done += 1
            _run(net, step, values, len(batches), weights)
        for name in (*step.inputs, *step.outputs):
            if name and program.last_read.get(name) == at:
                values.pop(name, None)


def _meeting(
    ahead: _Ahead, pair: Pair, layer: Layer, weights: Weights, source: Chunks, student: tuple[Net, Program]
) -> Meeting:
    theirs = ahead.net.layers[pair.teacher]
    teacher_source = ahead.take(theirs.input)
    axis = 1 if layer.kernel else -1
    channels = torch.tensor(pair.channels, device=ahead.program.device)
    target = [value.index_select(axis, channels) for value in ahead.take(pair.teacher)]
    scale, shift = _relation(_behind(ahead.net, ahead.program, theirs), _behind(*student, layer), channels)
    if bool((scale != 1).any() or (shift != 0).any()):
        by, plus = (value.reshape([-1] + [1] * len(layer.kernel)).to(target[0]) for value in (scale, shift))
        moved = [by * value + plus for value in target]
        made = [run_layer(layer, x, *weights) for x in source]
        # The two may stop at different places, as where one network pools before a constant: the outputs tell.
        if _distance(made, moved) < _distance(made, target):
            target = moved
        else:
            scale, shift = torch.ones_like(scale), torch.zeros_like(shift)
    return Meeting(pair, layer, geometry(layer), *weights, source, target, theirs, teacher_source, scale, shift)


def _distance(one: Chunks, other: Chunks) -> float:
    """Return the sum of squared differences."""
    return sum(float((a - b).square().sum()) for a, b in zip(one, other, strict=True))


def _relation(teacher: Affine, student: Affine, channels: Tensor) -> Affine:
    """Return what turns the teacher's output into the one that leads the student to the same value behind."""
    (by, plus), (own_by, own_plus) = (value[channels] for value in teacher), student
    # A channel that the student multiplies by zero may be anything.
    safe = torch.where(own_by == 0, 1.0, own_by)
    same = (by == own_by) & (plus == own_plus)
    return torch.where(same | (own_by == 0), 1.0, by / safe), torch.where(same, 0.0, (plus - own_plus) / safe)


def _behind(net: Net, program: Program, layer: Layer) -> Affine:
    """Return what constants alone do to a layer's outputs before anything else reads them, channel by channel.

    One file has a bias in its layer where another adds it behind, and so it is with a normalisation. What steps do is
    seen by what they make of a zero and of a one in each channel.
    """
    rank, axis = len(net.shapes[layer.name]), 1 if layer.kernel else -1
    shape = [1] * rank
    shape[axis] = len(layer.out_ids)
    zero = torch.zeros(shape, dtype=torch.double, device=program.device)
    values, name = [zero, zero + 1], layer.name
    while name not in program.outputs:
        readers = [step for step in program.steps if name in step.inputs]
        if len(readers) != 1 or readers[0].op not in _AFFINE or readers[0].inputs.count(name) != 1:
            break
        step, at = readers[0], readers[0].inputs.index(name)
        others = [program.constants.get(other) for other in step.inputs if other != name]
        # A constant over something is not linear in it; integers are no weights.
        if any(other is None or not other.is_floating_point() for other in others) or (step.op == "Div" and at):
            break
        held = step.module.state_dict().values() if step.module is not None else ()
        kind = next((tensor.dtype for tensor in held if tensor.is_floating_point()), torch.double)
        made = [call(step, [*others[:at], value.to(kind), *others[at:]])[0].double() for value in values]
        if made[0].shape != zero.shape:
            break  # other constants for other positions
        values, name = made, step.outputs[0]
    return (values[1] - values[0]).flatten(), values[0].flatten()


def _beside(
    teacher: tuple[Net, Program], student: tuple[Net, Program], pairs: Mapping[str, Pair]
) -> dict[str, tuple[str, str]]:
    """Return {student's layer: what the teacher's layer and it are added to}, where the student has that before it.

    Only where both come from the same layers: of three branches two tools may add another two first.
    """
    theirs, ours = addends(*teacher), addends(*student)
    program = student[1]
    behind, own = _sources(teacher[1]), _sources(program)
    known = {**{name: name for name in program.inputs}, **{name: pair.teacher for name, pair in pairs.items()}}
    made = {name: at for at, step in enumerate(program.steps) for name in step.outputs}
    return {
        name: (theirs[pair.teacher], ours[name])
        for name, pair in pairs.items()
        if pair.teacher in theirs
        and name in ours
        and not {theirs[pair.teacher], ours[name]} & (teacher[1].constants.keys() | program.constants.keys())
        and made.get(ours[name], -1) < made[name]
        and behind[theirs[pair.teacher]] == {known.get(source) for source in own[ours[name]]}
    }


def _sources(program: Program) -> dict[str, frozenset[str]]:
    """Return of every value the layers and graph inputs that it is made of, with no layer between."""
    found = {name: frozenset({name}) for name in program.inputs}
    for step in program.steps:
        own = (found.get(name, frozenset()) for name in step.inputs)
        made = frozenset({step.name}) if step.layer is not None else frozenset[str]().union(*own)
        found.update(dict.fromkeys(step.outputs, made))
    return found


def _alike(theirs: Chunks, ours: Chunks, meeting: Meeting) -> tuple[Chunks, Chunks] | None:
    """Return both branches, of the student's channels; None where they differ by more than the teacher's own size.

    Then one is not the other's counterpart.
    """
    axis = 1 if meeting.layer.kernel else -1
    channels = torch.tensor(meeting.pair.channels, device=theirs[0].device)
    wanted = [value.index_select(axis, channels) for value in theirs]
    if any(one.shape != other.shape for one, other in zip(wanted, ours, strict=True)):
        return None
    return (wanted, ours) if _distance(wanted, ours) < sum(float(one.square().sum()) for one in wanted) else None


def own_weights(net: Net, layer: Layer, tensors: Mapping[str, np.ndarray], device: torch.device) -> Weights:
    """Return a layer's weight and bias, of the file or as an earlier method left them."""
    weight, bias = layer_tensors(net, layer, device)
    if layer.weight in tensors:
        weight = stored(layer, torch.tensor(tensors[layer.weight]).to(weight))
    if bias is not None and layer.bias is not None and layer.bias in tensors:
        bias = torch.tensor(tensors[layer.bias]).to(bias)
    return weight, bias


def _start(program: Program, batches: list[Mapping[str, np.ndarray]]) -> dict[str, Chunks]:
    values: dict[str, Chunks] = {
        name: [torch.tensor(batch[name], device=program.device) for batch in batches] for name in program.inputs
    }
    return values | {name: [tensor] * len(batches) for name, tensor in program.constants.items()}


def _run(net: Net, step: Step, values: dict[str, Chunks], count: int, weights: Weights | None) -> None:
    if step.layer is not None:
        weights = weights or layer_tensors(net, step.layer, values[step.layer.input][0].device)
        values[step.name] = [run_layer(step.layer, x, *weights) for x in values[step.layer.input]]
        return
    made = [call(step, [values[name][chunk] if name else None for name in step.inputs]) for chunk in range(count)]
    for at, name in enumerate(step.outputs):
        if name and all(at < len(one) for one in made):
            values[name] = [one[at] for one in made]
