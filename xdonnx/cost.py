"""What an ONNX model costs: bytes, parameters, and multiply-accumulates for each layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import EncodeError
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from xdonnx.errors import JobError
from xdonnx.model import Dim, interface

Shape = tuple[int | None, ...]

# Weights beyond this need not travel through shape inference, which reads values only where they are shapes.
_SHAPE_VALUES = 1024

_FLOATS = frozenset(
    number for name, number in onnx.TensorProto.DataType.items() if name.startswith(("FLOAT", "BFLOAT", "DOUBLE"))
)


@dataclass(frozen=True)
class LayerCost:
    """What one node costs; `macs` is None where a shape it needs stays unknown.

    Parameters
    ----------
    op : {'Conv', 'ConvTranspose', 'Gemm', 'MatMul'}
    macs : int or None
        Multiply-accumulates of one run.
    params : int
        Elements of the weights that the node reads; a weight with several readers counts at each.
    """

    op: str
    macs: int | None
    params: int


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Parameters
    ----------
    bytes : int
        Of the model serialized as one file. What a file on disk costs is `model.file_bytes`.
    params, nonzero : int
        Elements of all floating-point weights, and those that are not zero. Each weight counts once.
    macs : int
        Sum over the layers whose shapes are known.
    layers : dict of str to LayerCost
        By the value that the layer produces, in the order of the graph.
    unknown : tuple of str
        Values whose nodes `macs` leaves out: a shape is not known before the run, or the node holds such
        nodes in a subgraph.
    """

    bytes: int
    params: int
    nonzero: int
    macs: int
    layers: Mapping[str, LayerCost]
    unknown: tuple[str, ...]


def measure_cost(proto: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Cost:
    """Return what a model costs for one run.

    Parameters
    ----------
    proto : onnx.ModelProto
        With its weights loaded, as `read_proto` returns it.
    shapes : dict of str to tuple of int, optional
        Shape of graph inputs for that run. Without it a free first axis is a batch of 1, and other free sizes
        stay unknown.

    Returns
    -------
    Cost
        Of convolutions (also transposed) and matrix products; other operators multiply too little to matter.

    Raises
    ------
    JobError
        A shape names no input, or contradicts one.

    Notes
    -----
    A convolution with weight (O, C/g, k...) costs O * C/g * prod(k) for each output position, a
    transposed one with weight (C, O/g, k...) costs C * O/g * prod(k) for each input position, and A @ B one
    for each output element and column of A. Biases are free. Nothing is guessed: a node of unknown shape is
    listed in `unknown`.
    """
    light = _without_weights(proto, shapes or {})
    if light.functions:
        light = onnx.inliner.inline_local_functions(light)
    weights: dict[str, tuple[int, int]] = {}
    inner = 0, 0
    for name, count in _weights(proto.graph):
        weights[name] = count
    for node in light.graph.node:
        for name, count in _constants(node):
            weights[name] = count
        for body in _bodies(node):
            for _, count in _all_weights(body):
                inner = inner[0] + count[0], inner[1] + count[1]
    known = _settled(light)
    layers: dict[str, LayerCost] = {}
    unknown: list[str] = []
    for node in light.graph.node:
        if any(_multiplies(body) for body in _bodies(node)):
            unknown.append(node.output[0])
        if node.domain in ("", "ai.onnx") and node.op_type in _MACS:
            macs = _macs(node, known)
            params = sum(weights.get(name, (0, 0))[0] for name in set(node.input))
            layers[node.output[0]] = LayerCost(node.op_type, macs, params)
            if macs is None:
                unknown.append(node.output[0])
    return Cost(
        bytes=_size(proto),
        params=inner[0] + sum(count for count, _ in weights.values()),
        nonzero=inner[1] + sum(count for _, count in weights.values()),
        macs=sum(layer.macs or 0 for layer in layers.values()),
        layers=layers,
        unknown=tuple(unknown),
    )


def _conv(node: onnx.NodeProto, known: Mapping[str, Shape]) -> list[Shape | None]:
    weight = known.get(node.input[1])
    return [known.get(node.output[0]), None if weight is None else weight[1:]]


def _conv_transpose(node: onnx.NodeProto, known: Mapping[str, Shape]) -> list[Shape | None]:
    weight = known.get(node.input[1])
    return [known.get(node.input[0]), None if weight is None else weight[1:]]


def _gemm(node: onnx.NodeProto, known: Mapping[str, Shape]) -> list[Shape | None]:
    left = known.get(node.input[0])
    turned = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return [known.get(node.output[0]), left and (left[:1] if turned else left[-1:])]


def _matmul(node: onnx.NodeProto, known: Mapping[str, Shape]) -> list[Shape | None]:
    left = known.get(node.input[0])
    return [known.get(node.output[0]), left and left[-1:]]


# Each gives the shapes whose sizes multiplied together are the node's multiply-accumulates.
_MACS = {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul}


def _macs(node: onnx.NodeProto, known: Mapping[str, Shape]) -> int | None:
    product = 1
    for shape in _MACS[node.op_type](node, known):
        if shape is None or None in shape:
            return None
        product *= int(_elements(shape))
    return product


def _settled(light: onnx.ModelProto) -> dict[str, Shape]:
    """Return the shapes of all values, alternating inference with the arithmetic that shapes are made by.

    Inference alone stops where a size is computed, as in the pads of a shortcut. Nodes that depend on small
    constants and known shapes only are evaluated, become constants themselves, and let inference go on.
    """
    nodes = light.graph.node
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in light.graph.initializer}
    while True:
        known = _shapes(light)
        done: list[int] = []
        for place, node in enumerate(nodes):
            found = _evaluate(node, known, values, light.opset_import)
            if found is not None:
                values[node.output[0]] = found
                light.graph.initializer.append(numpy_helper.from_array(found, node.output[0]))
                done.append(place)
        if not done:
            return known
        for place in reversed(done):
            del nodes[place]


def _evaluate(
    node: onnx.NodeProto,
    known: Mapping[str, Shape],
    values: Mapping[str, NDArray[Any]],
    opsets: Sequence[onnx.OperatorSetIdProto],
) -> NDArray[Any] | None:
    """Return the value of a node of one small output that depends on constants or shapes only; else None."""
    if node.domain not in ("", "ai.onnx") or len(node.output) != 1 or any(_bodies(node)):
        return None
    shape = known.get(node.output[0])
    # NonZero alone has a size that only its value tells; it cannot exceed its input's by much.
    small = node.op_type == "NonZero" or (shape is not None and _elements(shape) <= _SHAPE_VALUES)
    if not small or node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial"):
        return None
    feeds = {name: values[name] for name in node.input if name in values}
    if node.op_type == "Shape":
        source = known.get(node.input[0])
        if source is None or None in source:
            return None
        sizes = tuple(size for size in source if size is not None)
        feeds = {node.input[0]: np.broadcast_to(np.float32(0), sizes)}
    if any(name and name not in feeds for name in node.input):
        return None
    try:
        # As a function of one node: evaluated bare, it would be taken for one of the newest opset.
        alone = onnx.helper.make_function("alone", "alone", list(feeds), list(node.output), [node], opsets)
        with np.errstate(all="ignore"):
            found: Any = ReferenceEvaluator(alone).run(None, feeds, {})
    except Exception:  # whatever the evaluator cannot do stays unknown, and is listed so
        return None
    return found[0] if isinstance(found[0], np.ndarray) else None


def _elements(shape: Shape) -> float:
    return math.inf if None in shape else math.prod(size for size in shape if size is not None)


def _shapes(light: onnx.ModelProto) -> dict[str, Shape]:
    """Return what shape inference finds of every value; None for a free size."""
    try:
        # Data propagation follows sizes through Shape, Gather and Concat to the Reshape that uses them.
        graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    except onnx.shape_inference.InferenceError:
        graph = light.graph
    found: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            sizes = value.type.tensor_type.shape.dim
            found[value.name] = tuple(
                d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in sizes
            )
    return found


def _without_weights(proto: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """Return the model with inputs of fixed size and large weights turned into inputs of their shape."""
    # Before IR version 4 every initializer had to be an input too; from then on its own type is enough.
    light = onnx.ModelProto(ir_version=max(4, proto.ir_version))
    light.opset_import.extend(proto.opset_import)
    light.functions.extend(proto.functions)
    graph = light.graph
    graph.name = proto.graph.name or "graph"
    graph.node.extend(proto.graph.node)
    for tensor in proto.graph.initializer:
        if math.prod(tensor.dims) <= _SHAPE_VALUES:
            graph.initializer.append(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tuple(tensor.dims)))
    for sparse in proto.graph.sparse_initializer:
        name, kind = sparse.values.name, sparse.values.data_type
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, tuple(sparse.dims)))
    graph.input.extend(_fixed_inputs(proto, shapes))
    # Stale or symbolic sizes in the file would contradict the fixed ones. Only what comes out of operators
    # that inference does not know is taken from the file.
    for value in proto.graph.output:
        graph.output.add(name=value.name).type.CopyFrom(value.type)
        graph.output[-1].type.tensor_type.ClearField("shape")
    foreign = {name for node in proto.graph.node if node.domain not in ("", "ai.onnx") for name in node.output}
    graph.value_info.extend(value for value in proto.graph.value_info if value.name in foreign)
    return light


def _fixed_inputs(proto: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[onnx.ValueInfoProto]:
    ports = {port.name: port for port in interface(proto).inputs}
    for name in shapes:
        if name not in ports:
            raise JobError(f"the model has no input '{name}'.\n  Its inputs are: {', '.join(ports)}.")
    for value in proto.graph.input:
        if value.name not in ports:
            continue
        if not value.type.HasField("tensor_type"):
            yield value
            continue
        port, given = ports[value.name], shapes.get(value.name)
        sizes: Sequence[Dim] | None = port.shape
        if given is not None:
            if sizes is not None and not _fits(given, sizes):
                raise JobError(f"input {port} cannot have the shape {tuple(given)}.")
            sizes = given
        elif sizes and not isinstance(sizes[0], int):
            sizes = (1, *sizes[1:])
        yield onnx.helper.make_tensor_value_info(port.name, value.type.tensor_type.elem_type, sizes)


def _fits(given: Sequence[int], shape: Sequence[Dim]) -> bool:
    return len(given) == len(shape) and all(
        not isinstance(size, int) or size == want for size, want in zip(shape, given, strict=True)
    )


def _weights(graph: onnx.GraphProto) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield name and (elements, nonzero elements) of every floating-point initializer."""
    for tensor in graph.initializer:
        if tensor.data_type in _FLOATS:
            yield tensor.name, _count(tensor)
    for sparse in graph.sparse_initializer:
        if sparse.values.data_type in _FLOATS:
            yield sparse.values.name, (math.prod(sparse.dims), _count(sparse.values)[1])


def _constants(node: onnx.NodeProto) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the same of a Constant node."""
    if node.op_type != "Constant":
        return
    for attribute in node.attribute:
        if attribute.name == "value" and attribute.t.data_type in _FLOATS:
            yield node.output[0], _count(attribute.t)
        elif attribute.name == "sparse_value" and attribute.sparse_tensor.values.data_type in _FLOATS:
            sparse = attribute.sparse_tensor
            yield node.output[0], (math.prod(sparse.dims), _count(sparse.values)[1])
        elif attribute.name == "value_floats":
            yield node.output[0], (len(attribute.floats), int(np.count_nonzero(attribute.floats)))
        elif attribute.name == "value_float":
            yield node.output[0], (1, int(attribute.f != 0))


def _all_weights(graph: onnx.GraphProto) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the weights of a subgraph and of those within it."""
    yield from _weights(graph)
    for node in graph.node:
        yield from _constants(node)
        for body in _bodies(node):
            yield from _all_weights(body)


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _multiplies(graph: onnx.GraphProto) -> bool:
    return any(node.op_type in _MACS or any(_multiplies(body) for body in _bodies(node)) for node in graph.node)


def _count(tensor: onnx.TensorProto) -> tuple[int, int]:
    values = numpy_helper.to_array(tensor)
    if values.dtype.kind != "f":  # bfloat16 and the float8 types are no numbers to numpy
        values = values.astype(np.float32)
    return values.size, int(np.count_nonzero(values))


def _size(proto: onnx.ModelProto) -> int:
    try:
        return int(proto.ByteSize())
    except EncodeError:  # past 2 GiB protobuf cannot tell; next to such weights the rest is nothing
        return sum(int(tensor.ByteSize()) for tensor in proto.graph.initializer)
