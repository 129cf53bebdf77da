"""The bookkeeping of channel labels: who carries which, what is tied together, what may not go.

Every channel that a layer makes gets an integer, its label. Operators hand labels on; an addition ties two labels
(they stay or go together); what is not understood pins them. At the end each axis of each initializer has an array of
labels, and removing channels is `np.compress(keep[labels], array, axis)` for every operator alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from xdonnx.prepare import add_initializer, constant, set_array

Ids = np.ndarray  # int64, one label per channel


@dataclass(frozen=True)
class Track:
    """A value whose slices along `axis` are channels with these labels."""

    axis: int
    ids: Ids


@dataclass(frozen=True)
class Slot:
    """An initializer's axis whose entries bear labels.

    `role` is 'read' for the axis over which a layer mixes channels: zeros there make a channel count for nothing.
    """

    initializer: str
    axis: int
    ids: Ids
    role: str


@dataclass(frozen=True)
class Count:
    """A constant that states how many of some channels there are.

    `holder` names an initializer, or with `attribute` the first output of a node; `index` is the entry of a list.
    """

    holder: str
    attribute: str | None
    index: int | None
    ids: Ids


class Labels:
    """The growing record of one graph's labels; rules write into it node by node, in graph order."""

    def __init__(self, model: ir.Model, shapes: dict[str, tuple[int, ...]], batch: int = 1) -> None:
        self.model = model
        self.batch = batch
        self.graph = model.graph
        self.shapes = shapes
        self.tracks: dict[str, Track] = {}
        self.slots: dict[tuple[str, int], Slot] = {}
        self.counts: list[Count] = []
        self.readers: dict[str, set[ir.Node]] = {}  # initializer with slots -> nodes whose labels it was given
        self._parent: list[int] = []
        self._pins: dict[int, str] = {}
        self._streams: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._parent)

    def opset(self) -> int:
        """Return the version of the standard operators."""
        return self.model.opset_imports.get("", self.model.opset_imports.get("ai.onnx", 1))

    def fresh(self, count: int, *, pin: str | None = None) -> Ids:
        """Make `count` new labels, pinned from the start when a reason is given."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        ids = np.arange(start, start + count, dtype=np.int64)
        if pin:
            self.pin(ids, pin)
        return ids

    def roots(self, ids: Ids) -> Ids:
        """Return each label's representative."""
        return np.array([self._root(int(i)) for i in ids], dtype=np.int64)

    def _root(self, label: int) -> int:
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = self._parent[label]
        return label

    def tie(self, first: Ids, second: Ids, *, stream: str | None = None) -> None:
        """Let labels stay or go together, pair by pair; `stream` says that the two are added up, and where."""
        for a, b in zip(first, second, strict=True):
            low, high = sorted((self._root(int(a)), self._root(int(b))))
            if low == high:
                continue
            self._parent[high] = low
            for record in (self._pins, self._streams):
                if high in record:
                    record.setdefault(low, record[high])
            if stream:
                self._streams.setdefault(low, stream)

    def pin(self, ids: Ids, reason: str) -> None:
        """Keep these channels, and say why; the first reason stands."""
        for label in ids:
            self._pins.setdefault(self._root(int(label)), reason)

    def pinned(self) -> dict[int, str]:
        """Return {root: reason}."""
        return dict(self._pins)

    def streams(self) -> dict[int, str]:
        """Return {root: where it is added}: channels that several layers write together."""
        return {self._root(label): where for label, where in self._streams.items()}

    def shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """Return the value's shape with every size known, else None."""
        if value is None or value.name is None:
            return None
        array = constant(value)
        return tuple(array.shape) if array is not None else self.shapes.get(value.name)

    def track(self, value: ir.Value | None) -> Track | None:
        """Return the value's channels, None where it has none that could go."""
        return None if value is None else self.tracks.get(value.name or "")

    def follow(self, value: ir.Value, track: Track | None) -> None:
        """Record the channels of a node's output."""
        assert value.name is not None
        if track is not None:
            self.tracks[value.name] = track

    def pin_value(self, value: ir.Value | None, reason: str) -> None:
        """Keep all channels of a value."""
        track = self.track(value)
        if track is not None:
            self.pin(track.ids, reason)

    def pin_node(self, node: ir.Node, reason: str) -> None:
        """Keep all channels that a node reads; its outputs are unknown."""
        for value in node.inputs:
            self.pin_value(value, reason)

    def along(self, value: ir.Value, axis: int, reader: str) -> Ids | None:
        """Return the labels of a value along an axis, made and pinned where it has none; None if it has others."""
        track = self.track(value)
        if track is not None and track.axis == axis:
            return track.ids
        shape = self.shape(value)
        if track is not None or shape is None:
            return None
        return self.fresh(shape[axis], pin=f"'{value.name}', which '{reader}' reads, has no channels that can go")

    def slot(self, node: ir.Node, value: ir.Value, axis: int, ids: Ids, *, role: str = "own") -> None:
        """Record that an initializer's axis bears labels; a second reader of it is tied to the first."""
        assert value.name is not None
        key = (value.name, axis)
        if key in self.slots:
            self.tie(self.slots[key].ids, ids)
            if role == "read":
                self.slots[key] = replace(self.slots[key], role=role)
        else:
            self.slots[key] = Slot(value.name, axis, ids, role)
        self.readers.setdefault(value.name, set()).add(node)

    def count_attribute(self, node: ir.Node, attribute: str, index: int | None, ids: Ids) -> None:
        """Record that a node's attribute states how many of these labels there are."""
        if index is not None:
            numbers = list_attribute(node, attribute) or []
            numbers[index] = len(ids)  # one that counted from the end is written out
            node.attributes[attribute] = ir.AttrInt64s(attribute, numbers)
        self.counts.append(Count(str(node.outputs[0].name), attribute, index, ids))

    def count_input(
        self, node: ir.Node, position: int, entry: int, ids: Ids, *, inferred: tuple[int, ...] = ()
    ) -> bool:
        """Record that entry `entry` of a shape-like input states how many of these labels there are.

        Constants are made private to the node first, and an entry that counted from the end is written out. Entries
        in `inferred` (0 and -1 of a Reshape) follow by themselves. Returns False when the graph computes the entry.
        """
        value = node.inputs[position]
        owner, at = node, position
        while value is not None and constant(value) is None:
            concat = value.producer()
            if concat is None or concat.op_type != "Concat":
                return False
            owner = concat
            for part_at, part in enumerate(concat.inputs):
                shape = self.shape(part)
                if part is None or shape is None or len(shape) != 1:
                    return False
                if entry < shape[0]:
                    value, at = part, part_at
                    break
                entry -= shape[0]
            else:
                return False
        array = constant(value)
        if array is None or value is None:
            return False
        if int(array.reshape(-1)[entry]) in inferred:
            return True
        if len(value.uses()) > 1:
            value = add_initializer(self.graph, f"{value.name}_of_{node.outputs[0].name}", array)
            owner.replace_input_with(at, value)
        if int(array.reshape(-1)[entry]) != len(ids):
            array = array.copy()
            array.reshape(-1)[entry] = len(ids)
            set_array(value, array)
        self.counts.append(Count(str(value.name), None, entry, ids))
        return True

    def regular(self, array: np.ndarray) -> Track:
        """Turn labels spread over a whole value into one channel axis, tying what must go together.

        Removal has to leave a rectangular value. Where labels vary along several axes (a channel axis that was split
        in two, as in a channel shuffle), the longest axis stays free and the others are tied.
        """
        varying = [
            axis
            for axis in range(array.ndim)
            if array.shape[axis] > 1 and (array != np.take(array, [0], axis=axis)).any()
        ]
        if not varying:
            axis = int(np.argmax(array.shape)) if array.ndim else 0
            return Track(axis, np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)[:, 0])
        keep = max(varying, key=lambda axis: (array.shape[axis], axis))
        rows = np.moveaxis(array, keep, 0).reshape(array.shape[keep], -1)
        if len(varying) > 1:
            for row in rows:
                others = np.unique(row)
                self.tie(np.full(len(others) - 1, others[0]), others[1:])
        return Track(keep, rows[:, 0].copy())

    def close(self) -> None:
        """Pin what reads the same initializer without labels, and the graph's outputs."""
        for value in self.graph.outputs:
            self.pin_value(value, f"it is graph output '{value.name}'")
        for (name, _), slot in self.slots.items():
            value = self.graph.initializers[name]
            others = [user for user, _ in value.uses() if user not in self.readers[name]]
            if others or value.is_graph_output():
                where = others[0].outputs[0].name if others else "an output"
                self.pin(slot.ids, f"'{name}' is read whole by '{where}' too")


def list_attribute(node: ir.Node, name: str) -> list[int] | None:
    """Return an integer-list attribute, None where absent."""
    return [int(i) for i in node.attributes[name].as_ints()] if name in node.attributes else None


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute or its default."""
    return int(node.attributes[name].as_int()) if name in node.attributes else default


def text_attribute(node: ir.Node, name: str, default: str) -> str:
    """Return a text attribute or its default."""
    return str(node.attributes[name].as_string()) if name in node.attributes else default


def input_or_attribute(node: ir.Node, position: int, name: str) -> list[int] | None:
    """Return integers that older opsets keep in an attribute and newer ones in a constant input."""
    found = list_attribute(node, name)
    if found is None and name in node.attributes:
        return [int_attribute(node, name, 0)]
    if found is None and len(node.inputs) > position:
        array = constant(node.inputs[position])
        found = None if array is None else [int(i) for i in array.reshape(-1)]
    return found


def output_names(node: ir.Node) -> Sequence[str]:
    """Return the names of the values that a node produces."""
    return [str(v.name) for v in node.outputs if v.name]
