"""A `Patch` says what changes; `masked` and `cut` turn it into a model, with channels silenced or physically gone.

The two answer alike. That is the promise the rest of the project stands on: methods think in the teacher's shapes, with
dropped channels silenced, and only `cut` touches the shape of anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from xdonnx.graph import Net
from xdonnx.prepare import constant, set_array


@dataclass(frozen=True)
class Patch:
    """Changes to a net.

    Parameters
    ----------
    tensors : dict
        {initializer: new value in the teacher's shape}.
    drop : frozenset of int
        Labels of the channels that go.
    """

    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)
    drop: frozenset[int] = frozenset()

    def plus(self, tensors: Mapping[str, np.ndarray], drop: Iterable[int] = ()) -> Patch:
        """Return this patch with more changes; later tensors replace earlier ones."""
        return Patch({**self.tensors, **tensors}, self.drop | {int(label) for label in drop})

    def same(self, other: Patch) -> bool:
        """Whether it makes the very same changes."""
        mine, theirs = self.tensors, other.tensors
        return (
            self.drop == other.drop
            and mine.keys() == theirs.keys()
            and all(array is theirs[name] or np.array_equal(array, theirs[name]) for name, array in mine.items())
        )


def kept(net: Net, patch: Patch) -> np.ndarray:
    """Return a boolean per label: whether its channel stays."""
    keep = np.ones(net.labels, bool)
    keep[sorted(patch.drop)] = False
    return keep


def masked(net: Net, patch: Patch) -> onnx.ModelProto:
    """Return the patched model in the teacher's shapes, dropped channels silenced where they are read."""
    model = net.model.clone()
    keep = kept(net, patch)
    for name, value in model.graph.initializers.items():
        if name in patch.tensors:
            set_array(value, patch.tensors[name])
    for slot in net.slots:
        if slot.role != "read" or keep[slot.ids].all():
            continue
        value = model.graph.initializers[slot.initializer]
        array = constant(value)
        assert array is not None
        along = [1] * array.ndim
        along[slot.axis] = -1
        set_array(value, array * keep[slot.ids].reshape(along))
    return ir.to_proto(model)


def cut(net: Net, patch: Patch) -> onnx.ModelProto:
    """Return the patched model without the dropped channels.

    Every initializer axis that bears labels is compressed, every constant that states a number of channels restated.
    Names, order, dtypes, opset, metadata, doc strings and the interface stay.
    """
    model = net.model.clone()
    graph = model.graph
    keep = kept(net, patch)
    for name, value in graph.initializers.items():
        if name in patch.tensors:
            set_array(value, patch.tensors[name])
    for slot in net.slots:
        if keep[slot.ids].all():
            continue
        value = graph.initializers[slot.initializer]
        array = constant(value)
        assert array is not None and keep[slot.ids].any(), f"nothing of '{slot.initializer}' would be left"
        set_array(value, np.compress(keep[slot.ids], array, axis=slot.axis))
    nodes = {node.outputs[0].name: node for node in graph}
    for count in net.counts:
        if keep[count.ids].all():
            continue
        number = int(keep[count.ids].sum())
        if count.attribute is not None:
            node = nodes[count.holder]
            if count.index is None:
                node.attributes[count.attribute] = ir.AttrInt64(count.attribute, number)
            else:
                numbers = list(node.attributes[count.attribute].as_ints())
                numbers[count.index] = number
                node.attributes[count.attribute] = ir.AttrInt64s(count.attribute, numbers)
        else:
            value = graph.initializers[count.holder]
            array = constant(value)
            assert array is not None and count.index is not None
            restated = array.copy()
            restated.reshape(-1)[count.index] = number
            set_array(value, restated)
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None  # what was known about the teacher's widths
    return ir.to_proto(model)


def entry_bytes(array: np.ndarray, entries: int) -> int:
    """Return what an initializer costs in the file with so many entries that are not zero, by what pays: see below."""
    if array.dtype != np.float32 or array.ndim < 2 or not entries:
        return array.nbytes
    return min(entries * 12 + 64, array.nbytes)


def store_sparse(proto: onnx.ModelProto) -> int:
    """Move initializers into `sparse_initializer` where that makes the file smaller; returns how many moved.

    With 64-bit indices an entry costs 12 bytes against 4, so it pays above two thirds of zeros. Initializers that an
    older file format lists as graph inputs, and anything but 32-bit floats, stay dense.
    """
    inputs = {value.name for value in proto.graph.input}
    dense, moved = [], 0
    for tensor in proto.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or tensor.name in inputs:
            dense.append(tensor)
            continue
        array = numpy_helper.to_array(tensor)
        where = np.flatnonzero(array)
        if entry_bytes(array, len(where)) == array.nbytes:
            dense.append(tensor)
            continue
        values = numpy_helper.from_array(array.reshape(-1)[where], tensor.name)
        indices = numpy_helper.from_array(where.astype(np.int64), f"{tensor.name}_indices")
        proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, array.shape))
        moved += 1
    if moved:
        kept_dense = [onnx.TensorProto.FromString(t.SerializeToString()) for t in dense]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept_dense)
        # Sparse initializers came with IR version 5... the checker refuses them before.
        proto.ir_version = max(proto.ir_version, 5)
    return moved
