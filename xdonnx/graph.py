"""An ONNX file as a `Net`: its layers, the channels that may go, and the reason for every one that may not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir

from xdonnx.errors import ModelError
from xdonnx.labels import Count, Ids, Labels, Slot, Track
from xdonnx.layers import LAYERS, Layer
from xdonnx.model import Interface, interface
from xdonnx.prepare import constant, prepare
from xdonnx.rules import rule_for
from xdonnx.runtime import answer, open_session

# Stands in for a free height or width where neither the user nor the samples say one.
ASSUMED_SIZE = 224


@dataclass(frozen=True)
class Group:
    """Channels that the same layers read, and so the same decision is about.

    Parameters
    ----------
    name : str
        The first layer that makes them.
    ids : (units,) int
        One label a unit; a unit is what goes as a whole.
    producers, readers : tuple of str
        Layers that make and that mix these channels.
    stream : str or None
        Where several layers' outputs are added into these channels; None when each has one source.
    """

    name: str
    ids: Ids
    producers: tuple[str, ...]
    readers: tuple[str, ...]
    stream: str | None


@dataclass(frozen=True)
class Net:
    """A parsed teacher. Labels everywhere are representatives: equal labels stay or go together.

    Parameters
    ----------
    source : onnx.ModelProto
        The file as read.
    model : ir.Model
        The same function with constants folded and BatchNormalization in the layers; methods patch this one.
    interface : Interface
    shapes : dict
        Shape of every value for one sample, where known.
    assumed : tuple of str
        Input sizes that the graph leaves free and nobody gave.
    layers : dict
        {name: Layer} in graph order.
    groups : tuple of Group
        The channels that may go.
    slots, counts
        What removal has to shrink and to restate.
    tracks : dict
        {value: Track} for values whose channels are known.
    pinned : dict
        {label: reason} for channels that stay.
    labels : int
        One more than the largest label.
    batch : int
        Samples of one run: the graph's own batch where it is fixed, else 1.
    """

    source: onnx.ModelProto
    model: ir.Model
    interface: Interface
    shapes: Mapping[str, tuple[int, ...]]
    assumed: tuple[str, ...]
    layers: Mapping[str, Layer]
    groups: tuple[Group, ...]
    slots: tuple[Slot, ...]
    counts: tuple[Count, ...]
    tracks: Mapping[str, Track]
    pinned: Mapping[int, str]
    labels: int
    batch: int

    def array(self, initializer: str) -> np.ndarray:
        """Return an initializer's array."""
        array = constant(self.model.graph.initializers[initializer])
        assert array is not None
        return array

    @property
    def shared(self) -> frozenset[str]:
        """Weights that more than one node reads: no layer may change them for itself."""
        weights = {layer.weight for layer in self.layers.values()}
        return frozenset(name for name in weights if len(self.model.graph.initializers[name].uses()) > 1)

    def reasons(self, layer: Layer) -> list[str]:
        """Return why channels that this layer makes must stay, each reason once."""
        return list(dict.fromkeys(self.pinned[int(i)] for i in layer.out_ids if int(i) in self.pinned))


def read_net(proto: onnx.ModelProto, sizes: Mapping[str, Sequence[int]] | None = None) -> Net:
    """Parse a model into layers, labels and pins.

    Parameters
    ----------
    proto : onnx.ModelProto
        From :func:`xdonnx.model.read_proto`; not changed.
    sizes : dict, optional
        {graph input: full shape} for inputs whose height or width the graph leaves free. The batch entry is ignored.

    Raises
    ------
    ModelError
        The graph has no layer, or its shapes contradict each other.
    """
    model = prepare(proto)
    ports = interface(proto)
    concrete, assumed = _input_shapes(ports, sizes or {})
    prepared = ir.to_proto(model)
    shapes = infer_shapes(prepared, concrete)
    shapes.update(_measured_shapes(prepared, ports, concrete, shapes))
    batch = next((shape[0] for shape in concrete.values() if shape), 1)
    labels = Labels(model, shapes, batch)
    layers: dict[str, Layer] = {}
    for node in model.graph:
        make = LAYERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if make is None:
            rule_for(node)(labels, node)
        elif (layer := make(labels, node)) is not None:
            layers[layer.name] = layer
        for value in node.outputs[1:]:
            if (value.uses() or value.is_graph_output()) and labels.track(value) is None:
                labels.pin_node(node, f"{node.op_type} '{node.outputs[0].name}' makes '{value.name}' of them too")
    if not any(layer.op in ("Conv", "ConvTranspose") for layer in layers.values()):
        raise ModelError("the model has no convolution with a constant weight.\n  xdonnx compresses CNNs.")
    _pin_shared_weights(labels, layers)
    labels.close()
    layers = {name: _resolved(labels, layer) for name, layer in layers.items()}
    return Net(
        source=proto,
        model=model,
        interface=ports,
        shapes=shapes,
        assumed=assumed,
        layers=layers,
        groups=_groups(labels, layers),
        slots=tuple(replace(slot, ids=labels.roots(slot.ids)) for slot in labels.slots.values()),
        counts=tuple(replace(count, ids=labels.roots(count.ids)) for count in labels.counts),
        tracks={name: replace(track, ids=labels.roots(track.ids)) for name, track in labels.tracks.items()},
        pinned=labels.pinned(),
        labels=len(labels),
        batch=batch,
    )


def infer_shapes(proto: onnx.ModelProto, concrete: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every value that shape inference finds when the inputs have these shapes.

    Raises
    ------
    ModelError
        Shape inference finds a contradiction.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    # What exporters wrote about other sizes would contradict the sizes asked for here.
    del copy.graph.value_info[:]
    for value in copy.graph.input:
        if value.name in concrete:
            dims = value.type.tensor_type.shape
            del dims.dim[:]
            for size in concrete[value.name]:
                dims.dim.add().dim_value = int(size)
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    except Exception as error:  # the checker's errors share no parent across onnx versions
        raise ModelError(f"shapes in the model contradict each other.\n  {error}") from error
    found: dict[str, tuple[int, ...]] = {}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            found[value.name] = tuple(d.dim_value for d in tensor.shape.dim)
    return found


def _measured_shapes(
    proto: onnx.ModelProto,
    ports: Interface,
    concrete: Mapping[str, Sequence[int]],
    known: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
    """Ask onnxruntime for the shapes that inference could not find, by one run on noise."""
    missing = [name for node in proto.graph.node for name in node.output if name and name not in known]
    if not missing or any(port.name not in concrete for port in ports.inputs):
        return {}
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    declared = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in missing if name not in declared)
    noise = np.random.default_rng(0)
    try:
        feeds = {
            port.name: noise.standard_normal(tuple(concrete[port.name])).astype(port.dtype) for port in ports.inputs
        }
        found = answer(open_session(copy, optimize=False), feeds, missing)
    except TypeError:
        return {}  # an input that noise cannot fill, such as text
    except ModelError as error:
        if any(not port.dtype.startswith("float") for port in ports.inputs):
            return {}  # noise is no index
        makers = {name: node.op_type for node in proto.graph.node for name in node.output}
        raise ModelError(f"{makers[missing[0]]} '{missing[0]}' cannot be computed.\n  {error}") from error
    return {name: array.shape for name, array in found.items() if isinstance(array, np.ndarray)}


def _input_shapes(
    ports: Interface, sizes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """Fill in free sizes: one sample, then what the caller says, then an assumption that is reported."""
    concrete: dict[str, tuple[int, ...]] = {}
    assumed = []
    for port in ports.inputs:
        if port.shape is None:
            if port.name in sizes:
                concrete[port.name] = tuple(int(s) for s in sizes[port.name])
            continue
        given = sizes.get(port.name)
        shape = []
        for at, size in enumerate(port.shape):
            if isinstance(size, int):
                shape.append(size)
            elif at == 0:
                shape.append(1)
            elif given is not None:
                shape.append(int(given[at]))
            else:
                shape.append(ASSUMED_SIZE)
                assumed.append(f"{port.name} axis {at} = {ASSUMED_SIZE}")
        concrete[port.name] = tuple(shape)
    return concrete, tuple(assumed)


def _pin_shared_weights(labels: Labels, layers: Mapping[str, Layer]) -> None:
    for layer in layers.values():
        readers = [user.outputs[0].name for user, _ in labels.graph.initializers[layer.weight].uses()]
        if len(readers) > 1:
            reason = f"'{readers[0]}' and '{readers[1]}' share the weight '{layer.weight}'"
            labels.pin(layer.out_ids, reason)
            labels.pin(layer.columns[layer.columns >= 0], reason)


def _resolved(labels: Labels, layer: Layer) -> Layer:
    columns = layer.columns.copy()
    columns[columns >= 0] = labels.roots(columns[columns >= 0])
    return replace(layer, out_ids=labels.roots(layer.out_ids), columns=columns)


def _groups(labels: Labels, layers: Mapping[str, Layer]) -> tuple[Group, ...]:
    """Sort the channels that may go by who makes and who reads them."""
    makers: dict[int, dict[str, None]] = {}
    readers: dict[int, dict[str, None]] = {}
    for layer in layers.values():
        # A depthwise layer hands channels on: it neither makes nor mixes them.
        if not layer.depthwise:
            for label in layer.out_ids:
                makers.setdefault(int(label), {})[layer.name] = None
        for label in layer.columns:
            if label >= 0:
                readers.setdefault(int(label), {})[layer.name] = None
    pinned, streams = labels.pinned(), labels.streams()
    # Channels that travel apart anywhere (through the halves of a Split) are decided apart, so that some of each stay.
    travel: dict[int, list[str]] = {}
    for name, track in labels.tracks.items():
        for label in np.unique(labels.roots(track.ids)):
            travel.setdefault(int(label), []).append(name)
    sorted_out: dict[tuple[tuple[str, ...], tuple[str, ...], str | None, tuple[str, ...]], list[int]] = {}
    for label in sorted(makers):
        if label in pinned:
            continue
        if label not in readers:
            labels.pin(np.array([label]), "no layer reads it")
            continue
        key = (tuple(makers[label]), tuple(readers[label]), streams.get(label), tuple(travel.get(label, ())))
        sorted_out.setdefault(key, []).append(label)
    groups = []
    for (made_by, read_by, stream, _), ids in sorted_out.items():
        if len(ids) == 1:
            labels.pin(np.array(ids), "it is the only channel of its kind")
            continue
        groups.append(Group(made_by[0], np.array(ids, np.int64), made_by, read_by, stream))
    return tuple(groups)
