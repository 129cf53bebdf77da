"""The student end to end: a torch program whose weights are open, and the values at which it meets the teacher.

The walk sees one layer at a time; here every layer moves at once. Channels that are gone are not computed: the student
runs as the cut graph wherever that graph converts, and its weights are put back into the teacher's shapes afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xdonnx.convert import Program, call, convert, run_layer, stored
from xdonnx.errors import XdonnxError
from xdonnx.graph import Net, read_net
from xdonnx.layers import Layer
from xdonnx.patch import Patch, cut, kept

# Shapes of so many sizes are compared at most; of pyramids with more the last ones, closest to the answers.
MOST_STAGES = 5
# What only turns scores into shares: the scores themselves say more.
_SQUASHES = frozenset({"Softmax", "LogSoftmax", "Identity"})
# What these choose differs as soon as their inputs do, so nothing after them compares element by element.
_PICKS = frozenset({"NonMaxSuppression", "NonZero", "Unique", "Compress", "TopK"})
# Cut and masked student may differ by this share of a value's norm before the masked one is preferred.
_SAME = 1e-3


@dataclass(frozen=True)
class Taps:
    """Values at which two networks are compared.

    Parameters
    ----------
    stages : tuple of str
        The last value of each spatial size, in graph order: the ends of stages, and what global pooling reads.
    answers : tuple of str
        The graph's floating outputs, before a final softmax; where a graph picks among boxes, what it picks from.
    """

    stages: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """Stages, then answers, each once."""
        return tuple(dict.fromkeys((*self.stages, *self.answers)))


def find_taps(net: Net, program: Program) -> Taps:
    """Choose where teacher and student are compared.

    MiR (Wang et al., CVPR 2022) found the features before global pooling to be the best single place; the ends of
    earlier stages steer the layers before them, and the answers are what users read.
    """
    makers = {name: step for step in program.steps for name in step.outputs}
    moved: set[str] = set()  # what the student's weights can change
    picked: set[str] = set()  # what depends on a choice
    answers: list[str] = []
    last: dict[tuple[int, ...], str] = {}
    for step in program.steps:
        if step.layer is None and not moved.intersection(step.inputs):
            continue
        moved.update(step.outputs)
        if step.op in _PICKS:
            answers += [name for name in step.inputs if name in moved - picked]
        if step.op in _PICKS or picked.intersection(step.inputs):
            picked.update(step.outputs)
            continue
        shape = net.shapes.get(step.name, ())
        if len(shape) >= 3 and max(shape[2:]) > 1:
            last.pop(shape[2:], None)
            last[shape[2:]] = step.name
    for port in net.interface.outputs:
        name = port.name
        while name in makers and makers[name].op in _SQUASHES and makers[name].inputs[0] in moved:
            name = makers[name].inputs[0]
        if name in moved - picked and "float" in port.dtype:
            answers.append(name)
    answers = list(dict.fromkeys(answers))
    stages = [name for name in last.values() if name not in answers]
    return Taps(tuple(stages[-MOST_STAGES:]), tuple(answers))


Weights = Mapping[str, Tensor]
"""{initializer: tensor}, as the file stores it."""


def execute(program: Program, inputs: Mapping[str, Tensor], weights: Weights, wanted: tuple[str, ...]) -> list[Tensor]:
    """Run a program with these weights and return the wanted values; the rest is freed as soon as nobody reads it."""
    values: dict[str, Tensor] = {**program.constants, **inputs}
    found: dict[str, Tensor] = {name: values[name] for name in wanted if name in values}
    for at, step in enumerate(program.steps):
        if step.layer is not None:
            layer = step.layer
            bias = None if layer.bias is None else weights[layer.bias]
            made: tuple[Tensor, ...] = (
                run_layer(layer, values[layer.input], stored(layer, weights[layer.weight]), bias),
            )
        else:
            made = call(step, [values[name] if name else None for name in step.inputs])
        for name, value in zip(step.outputs, made, strict=False):
            if name:
                values[name] = value
                if name in wanted:
                    found[name] = value
        for name in (*step.inputs, *step.outputs):
            if name and program.last_read.get(name) == at and name not in program.constants:
                values.pop(name, None)
        if len(found) == len(wanted):
            break
    return [found[name] for name in wanted]


def teacher_weights(net: Net, device: torch.device) -> dict[str, Tensor]:
    """Return the teacher's weights and biases of all layers."""
    names = {name for layer in net.layers.values() for name in (layer.weight, layer.bias) if name}
    return {name: torch.tensor(net.array(name), device=device) for name in sorted(names)}


@dataclass(frozen=True, eq=False)
class Student:
    """A student whose weights can be trained.

    Parameters
    ----------
    program : Program
    weights : dict
        {initializer: tensor} of every layer, in the student's own shapes; trained in place.
    masks : dict
        {initializer: bool tensor} for weights that hold zeros: what is zero stays zero.
    picks : dict
        {value: (axis, indices)}: which of the teacher's channels the student still has.
    whole : bool, default=False
        Whether the program still computes the channels that are gone, for nobody to read.
    """

    program: Program
    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    picks: Mapping[str, tuple[int, Tensor]]
    whole: bool = False

    def of_teacher(self, name: str, value: Tensor) -> Tensor:
        """Return the part of a teacher's value that the student has too."""
        if name not in self.picks:
            return value
        axis, indices = self.picks[name]
        return value.index_select(axis, indices)

    def of_student(self, name: str, value: Tensor) -> Tensor:
        """Return a value that the program computed without the channels that are gone."""
        return self.of_teacher(name, value) if self.whole else value

    def patch(self, net: Net, patch: Patch) -> Patch:
        """Return the patch with the weights as they are now, in the teacher's shapes."""
        keep = kept(net, patch)
        tensors = {}
        for name, tensor in self.weights.items():
            whole = np.array(patch.tensors.get(name, net.array(name)))
            places = [np.arange(size) for size in whole.shape]
            for slot in net.slots:
                if slot.initializer == name and whole.shape != tuple(tensor.shape):
                    places[slot.axis] = np.flatnonzero(keep[slot.ids])
            whole[np.ix_(*places)] = tensor.detach().cpu().numpy().astype(whole.dtype)
            tensors[name] = whole
        return patch.plus(tensors)


def open_student(net: Net, patch: Patch, program: Program, taps: Taps, sample: Mapping[str, Tensor]) -> Student:
    """Build the student of a patch, cut where channels are gone.

    Parameters
    ----------
    program : Program
        The teacher's.
    sample : {graph input: (n, ...)}
        A few samples, on which the cut student is checked against the masked one.
    """
    keep = kept(net, patch)
    picks = {
        name: (net.tracks[name].axis, torch.tensor(np.flatnonzero(keep[net.tracks[name].ids]), device=program.device))
        for name in taps.all
        if name in net.tracks and not keep[net.tracks[name].ids].all()
    }
    whole = _whole(net, patch, program, keep)
    if not patch.drop:
        return whole
    small = _small(net, patch, program, picks)
    if small is None:
        return Student(whole.program, whole.weights, whole.masks, picks, whole=True)
    with torch.no_grad():
        ours = execute(small.program, sample, small.weights, taps.all)
        theirs = execute(whole.program, sample, whole.weights, taps.all)
    for name, a, b in zip(taps.all, ours, theirs, strict=True):
        b = small.of_teacher(name, b)
        if a.shape != b.shape or not float((a - b).norm()) <= _SAME * float(b.norm().clamp(min=1e-6)):
            return Student(whole.program, whole.weights, whole.masks, picks, whole=True)
    return small


def _whole(net: Net, patch: Patch, program: Program, keep: np.ndarray) -> Student:
    """Return the student in the teacher's shapes, dropped channels silenced where they are read."""
    weights, masks = {}, {}
    for name, tensor in teacher_weights(net, program.device).items():
        array = np.array(patch.tensors.get(name, tensor.cpu().numpy()))
        for slot in net.slots:
            if slot.initializer == name and slot.role == "read":
                along = [1] * array.ndim
                along[slot.axis] = -1
                array = array * keep[slot.ids].reshape(along)
        weights[name] = torch.tensor(array, device=program.device)
        if array.ndim > 1 and not array.all():
            masks[name] = weights[name] != 0
    return Student(program, weights, masks, {})


def _small(net: Net, patch: Patch, program: Program, picks: Mapping[str, tuple[int, Tensor]]) -> Student | None:
    """Return the student as its cut graph, None where that graph does not convert or goes by other names."""
    try:
        cut_net = read_net(cut(net, patch), {port.name: net.shapes[port.name] for port in net.interface.inputs})
        own = convert(cut_net, program.device, program.foreign)
    except (XdonnxError, KeyError):
        return None
    if any(_names(a) != _names(b) for a, b in zip(net.layers.values(), cut_net.layers.values(), strict=False)):
        return None
    weights = teacher_weights(cut_net, program.device)
    masks = {name: tensor != 0 for name, tensor in weights.items() if tensor.ndim > 1 and not bool(tensor.all())}
    return Student(own, weights, masks, picks)


def _names(layer: Layer) -> tuple[str, str, str | None]:
    return layer.name, layer.weight, layer.bias
