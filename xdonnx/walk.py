"""Walk the graph once, teacher and student abreast, and stop at each layer while the student's weights are open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from xdonnx.columns import Geometry
from xdonnx.convert import Program, Step, call, geometry, layer_tensors, run_layer
from xdonnx.graph import Net
from xdonnx.layers import Layer
from xdonnx.shelf import Chunks, Kept, Place, Room, Shelf, alike


@dataclass(frozen=True, eq=False)
class Stop:
    """A layer whose inputs are known in both networks and whose student weights are not.

    Parameters
    ----------
    layer : Layer
    geometry : Geometry
    teacher, student : sequence of Tensor
        The layer's input, chunk by chunk; the same objects where the two networks still agree. Good until the walk
        goes on.
    weight, bias : Tensor, Tensor or None
        The teacher's, in ONNX layout.
    beside : (teacher, student) sequences of Tensor, optional
        What the layer's output will be added to, where that is known already: the other branch of a residual block.
    """

    layer: Layer
    geometry: Geometry
    teacher: Chunks
    student: Chunks
    weight: Tensor
    bias: Tensor | None
    beside: tuple[Chunks, Chunks] | None = None

    @property
    def agree(self) -> bool:
        """Whether nothing upstream has changed."""
        return alike(self.teacher, self.student)


# What one value of all rows may take: a walk holds a few of them, for two networks. And the multiply-accumulates of all
# rows in one network: ten seconds on a core.
MOST_BYTES, MOST_MACS = 1 << 28, 2e11
# What one value of one chunk may take: a step works on a few of them. By the graph alone, whatever memory there is, so
# that a job gives the same bytes everywhere.
CHUNK_BYTES = 1 << 26

# Share of its input channels up to which a convolution of the student runs on them alone: they have to be copied.
MOST_READ = 0.8

Weights = tuple[Tensor, Tensor | None]
Visit = Callable[[Stop], Weights | None]


def affordable(net: Net, rows: int) -> int:
    """Return how many rows of views a walk may be shown, at most `rows`: within `MOST_BYTES` and `MOST_MACS`."""
    largest = largest_value(net)
    macs = sum(layer.macs for layer in net.layers.values())
    return min(rows, MOST_BYTES // (4 * largest), int(MOST_MACS / max(1, macs)))


def largest_value(net: Net) -> int:
    """Return the elements that the largest value of the graph has for one sample."""
    return max((prod(shape[1:]) for shape in net.shapes.values() if shape), default=1) or 1


def at_once(net: Net, most: int = 64) -> int:
    """Return how many rows a network of any batch size is shown at once: `most`, fewer where values are large."""
    return min(most, max(1, CHUNK_BYTES // (4 * largest_value(net))))


def chunked(net: Net, inputs: Mapping[str, np.ndarray], most: int = 64) -> list[dict[str, np.ndarray]]:
    """Cut rows into batches that the graph accepts: its fixed size, or up to `most`, fewer where values are large.

    Rows that do not fill a fixed batch are left out.
    """
    rows = len(next(iter(inputs.values())))
    fixed = net.interface.batch
    size = fixed if fixed else min(most, at_once(net))
    starts = range(0, rows - size + 1 if fixed else rows, size)
    return [{name: array[start : start + size] for name, array in inputs.items()} for start in starts]


@torch.no_grad()
def walk(
    net: Net,
    program: Program,
    inputs: Mapping[str, np.ndarray],
    visit: Visit,
    room: Room | None = None,
    others: Mapping[str, np.ndarray] | None = None,
    *,
    answers: bool = True,
    last: str | None = None,
) -> tuple[dict[str, list[Tensor]], ...]:
    """Execute every node once for teacher and student; values nobody reads any more are freed.

    Parameters
    ----------
    inputs : {graph input: (n, ...)}
    visit : callable
        Called at every layer in graph order; returns the student's weight and bias, or None to keep the teacher's.
    room : Room, optional
        For the values that are held between two steps; what has no room there lies in temporary files. By default all
        are held.
    others : {graph input: (m, ...)}, optional
        Further rows, in chunks of their own behind the others.
    answers : bool, default=True
        Whether the graph's outputs are wanted: of all samples, and of any size.
    last : str, optional
        The last layer to stop at: the walk ends there, without answers.

    Returns
    -------
    teacher, student : {graph output: chunks}

    Raises
    ------
    MachineError
        The disk is full.
    """
    batches = chunked(net, inputs) + (chunked(net, others) if others else [])
    reads: dict[str, list[int]] = {}
    for at, step in enumerate(program.steps):
        for name in dict.fromkeys(step.inputs):
            reads.setdefault(name, []).append(at)
    room = room or Room()
    with Shelf(room.limit, reads) as shelf:
        pair = _Pair(net, program, shelf, len(batches))
        for name in program.inputs:
            pair.values[0][name] = pair.values[1][name] = [
                torch.as_tensor(np.require(batch[name], requirements="W"), device=program.device) for batch in batches
            ]
        added = addends(net, program)
        for at, step in enumerate(program.steps):
            shelf.now = at
            if step.layer is not None:
                pair.run_layer(step, step.layer, visit, added.get(step.name, ""), ends=step.layer.name == last)
                if step.layer.name == last:
                    break
            else:
                pair.run(step)
            for name in (*step.inputs, *step.outputs):
                if name and program.last_read.get(name) == at:
                    pair.forget(name)
        wanted = program.outputs if answers and last is None else ()
        teacher, student = ({name: list(values[name]) for name in wanted} for values in pair.values)
        room.spilled += shelf.spilled
    return teacher, student


class _Pair:
    """The values of teacher and student, and the steps that make them."""

    def __init__(self, net: Net, program: Program, shelf: Shelf, count: int) -> None:
        self.net, self.program, self.shelf, self.count = net, program, shelf, count
        constants: dict[str, Chunks] = {name: [tensor] * count for name, tensor in program.constants.items()}
        self.values: tuple[dict[str, Chunks], dict[str, Chunks]] = (constants, dict(constants))

    def forget(self, name: str) -> None:
        """Free a value."""
        for values in self.values:
            values.pop(name, None)

    def run(self, step: Step) -> None:
        """Run a step that is no layer, for each network on its own values."""
        teacher, student = self.values
        same = all(alike(teacher[name], student[name]) for name in step.inputs if name)
        made: tuple[dict[str, list[Place]], dict[str, list[Place]]] = ({}, {})
        for chunk in range(self.count):
            seen = [teacher[name][chunk] if name else None for name in step.inputs]
            whole = call(step, seen)
            self._keep(step, whole, chunk, made[0])
            if not same:
                mine = [student[name][chunk] if name else None for name in step.inputs]
                if all(a is b for a, b in zip(seen, mine, strict=True)):
                    for name, places in made[0].items():
                        made[1].setdefault(name, []).append(places[-1])
                else:
                    self._keep(step, call(step, mine), chunk, made[1])
            self._release(step, chunk)
        for name in step.outputs:
            if len(made[0].get(name, ())) == self.count:
                teacher[name] = student[name] = Kept(made[0][name])
                if not same:
                    student[name] = Kept(made[1][name])

    def run_layer(self, step: Step, layer: Layer, visit: Visit, other: str, *, ends: bool = False) -> None:
        """Stop at a layer, then run it with the teacher's weights and with those that the stop brought."""
        teacher, student = self.values
        weight, bias = layer_tensors(self.net, layer, self.program.device)
        beside = None
        if other in teacher and other not in self.program.constants:
            beside = (teacher[other], student[other])
        stop = Stop(layer, geometry(layer), teacher[layer.input], student[layer.input], weight, bias, beside)
        answer = visit(stop)
        if ends:
            return
        same = answer is None and stop.agree
        own, made_t, made_s = answer or (weight, bias), list[Place](), list[Place]()
        read = None if answer is None else _read(layer, own[0])
        if read is not None:
            own = (own[0].index_select(1, read), own[1])
        for chunk in range(self.count):
            x_t, x_s = stop.teacher[chunk], stop.student[chunk]
            made_t.append(self.shelf.put(run_layer(layer, x_t, weight, bias), layer.name, chunk))
            if not same:
                agree = answer is None and x_t is x_s
                if read is not None:
                    x_s = x_s.index_select(1, read)
                made_s.append(made_t[-1] if agree else self.shelf.put(run_layer(layer, x_s, *own), layer.name, chunk))
            self._release(step, chunk)
        teacher[layer.name] = student[layer.name] = Kept(made_t)
        if not same:
            student[layer.name] = Kept(made_s)

    def _keep(self, step: Step, made: tuple[Tensor, ...], chunk: int, places: dict[str, list[Place]]) -> None:
        for name, tensor in zip(step.outputs, made, strict=False):
            if name:
                places.setdefault(name, []).append(self.shelf.put(tensor, name, chunk))

    def _release(self, step: Step, chunk: int) -> None:
        """Free a chunk of what this step is the last to read."""
        for name in step.inputs:
            if name and self.program.last_read.get(name) == self.shelf.now:
                for values in self.values:
                    if isinstance(found := values.get(name), Kept):
                        found.places[chunk] = None


def _read(layer: Layer, weight: Tensor) -> Tensor | None:
    """Return the input channels that a convolution reads at all; None where leaving out the others saves little."""
    if layer.op != "Conv" or layer.groups > 1:
        return None
    read = weight.transpose(0, 1).flatten(1).any(1).nonzero()[:, 0]
    return read if 0 < len(read) <= weight.shape[1] * MOST_READ else None


def addends(net: Net, program: Program) -> dict[str, str]:
    """Return {layer: value} for layers whose output is read by an addition alone: what of its shape is added to it."""
    readers: dict[str, list[Step]] = {}
    for step in program.steps:
        for name in step.inputs:
            readers.setdefault(name, []).append(step)
    found = {}
    for step in program.steps:
        reading = readers.get(step.name, [])
        if step.layer is None or len(reading) != 1 or step.name in program.outputs:
            continue
        if reading[0].op == "Add" and len(set(reading[0].inputs)) == 2:
            other = next(name for name in reading[0].inputs if name != step.name)
            if step.name in net.shapes and net.shapes[step.name] == net.shapes.get(other):
                found[step.name] = other
    return found
