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

Chunks = list[Tensor]


@dataclass(frozen=True, eq=False)
class Stop:
    """A layer whose inputs are known in both networks and whose student weights are not.

    Parameters
    ----------
    layer : Layer
    geometry : Geometry
    teacher, student : list of Tensor
        The layer's input, chunk by chunk; the same objects where the two networks still agree.
    weight, bias : Tensor, Tensor or None
        The teacher's, in ONNX layout.
    beside : (teacher, student) lists of Tensor, optional
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
        return all(a is b for a, b in zip(self.teacher, self.student, strict=True))


# What one value of all rows may take: a walk holds a few of them, for two networks. And the multiply-accumulates of all
# rows in one network: ten seconds on a core.
MOST_BYTES, MOST_MACS = 1 << 28, 2e11

Weights = tuple[Tensor, Tensor | None]
Visit = Callable[[Stop], Weights | None]


def affordable(net: Net, rows: int) -> int:
    """Return how many rows of views a walk may be shown, at most `rows`: within `MOST_BYTES` and `MOST_MACS`."""
    largest = max((prod(shape[1:]) for shape in net.shapes.values()), default=1)
    macs = sum(layer.macs for layer in net.layers.values())
    return min(rows, MOST_BYTES // (4 * max(1, largest)), int(MOST_MACS / max(1, macs)))


def chunked(net: Net, inputs: Mapping[str, np.ndarray], most: int = 64) -> list[dict[str, np.ndarray]]:
    """Cut rows into batches that the graph accepts: its fixed batch size, or up to `most`.

    Rows that do not fill a fixed batch are left out.
    """
    rows = len(next(iter(inputs.values())))
    fixed = [p.shape[0] for p in net.interface.inputs if p.shape and isinstance(p.shape[0], int)]
    size = fixed[0] if fixed else most
    starts = range(0, rows - size + 1 if fixed else rows, size)
    return [{name: array[start : start + size] for name, array in inputs.items()} for start in starts]


@torch.no_grad()
def walk(
    net: Net,
    program: Program,
    inputs: Mapping[str, np.ndarray],
    visit: Visit,
    others: Mapping[str, np.ndarray] | None = None,
) -> tuple[dict[str, Chunks], ...]:
    """Execute every node once for teacher and student; values nobody reads any more are freed.

    Parameters
    ----------
    inputs : {graph input: (n, ...)}
    visit : callable
        Called at every layer in graph order; returns the student's weight and bias, or None to keep the teacher's.
    others : {graph input: (m, ...)}, optional
        Further rows, in chunks of their own behind the others.

    Returns
    -------
    teacher, student : {graph output: chunks}
    """
    batches = chunked(net, inputs) + (chunked(net, others) if others else [])
    teacher: dict[str, Chunks] = {
        name: [torch.tensor(batch[name], device=program.device) for batch in batches] for name in program.inputs
    }
    student = dict(teacher)
    for name, tensor in program.constants.items():
        teacher[name] = student[name] = [tensor] * len(batches)
    addends = _addends(net, program)
    for at, step in enumerate(program.steps):
        if step.layer is not None:
            _run_layer(net, program, step, teacher, student, visit, addends.get(step.name, ""))
        else:
            _run(step, teacher, student, len(batches))
        for name in (*step.inputs, *step.outputs):
            if name and program.last_read.get(name) == at:
                teacher.pop(name, None)
                student.pop(name, None)
    return (
        {name: teacher[name] for name in program.outputs},
        {name: student[name] for name in program.outputs},
    )


def _run(step: Step, teacher: dict[str, Chunks], student: dict[str, Chunks], count: int) -> None:
    made_t: list[tuple[Tensor, ...]] = []
    made_s: list[tuple[Tensor, ...]] = []
    for chunk in range(count):
        seen_t = [teacher[name][chunk] if name else None for name in step.inputs]
        seen_s = [student[name][chunk] if name else None for name in step.inputs]
        made_t.append(call(step, seen_t))
        same = all(a is b for a, b in zip(seen_t, seen_s, strict=True))
        made_s.append(made_t[-1] if same else call(step, seen_s))
    for at, name in enumerate(step.outputs):
        if name and all(at < len(made) for made in made_t):
            teacher[name] = [made[at] for made in made_t]
            student[name] = [made[at] for made in made_s]


def _run_layer(
    net: Net,
    program: Program,
    step: Step,
    teacher: dict[str, Chunks],
    student: dict[str, Chunks],
    visit: Visit,
    other: str,
) -> None:
    layer = step.layer
    assert layer is not None
    weight, bias = layer_tensors(net, layer, program.device)
    beside = (teacher[other], student[other]) if other in teacher and other not in program.constants else None
    stop = Stop(layer, geometry(layer), teacher[layer.input], student[layer.input], weight, bias, beside)
    answer = visit(stop)
    made_t = [run_layer(layer, x, weight, bias) for x in stop.teacher]
    if answer is None:
        made_s = [
            t if a is b else run_layer(layer, b, weight, bias)
            for a, b, t in zip(stop.teacher, stop.student, made_t, strict=True)
        ]
    else:
        made_s = [run_layer(layer, x, *answer) for x in stop.student]
    teacher[layer.name], student[layer.name] = made_t, made_s


def _addends(net: Net, program: Program) -> dict[str, str]:
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
