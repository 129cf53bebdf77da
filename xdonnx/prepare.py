"""Bring a graph into the form that the rest reads: constants lifted, BatchNormalization folded into its layer.

Folding a BatchNormalization (Ioffe & Szegedy, 2015) with scale g, shift b, mean m, variance v into the layer before it:

    g (W x + c - m) / sqrt(v + eps) + b   =   (s W) x + (s (c - m) + b),    s = g / sqrt(v + eps)

so row i of W is scaled by s_i. The folded layer takes over the name of the value that the BatchNormalization produced:
that is the value which the rest of the graph, and the user, goes on to see.
"""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

# A quantized constant stays behind its DequantizeLinear: folding it would undo the quantization of the file.
_KEEP = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
# Shared constants of up to this many elements are copied for each reader.
_SMALL = 65536
_FOLDABLE_INTO = {"Conv", "ConvTranspose", "Gemm"}


def prepare(proto: onnx.ModelProto) -> ir.Model:
    """Return an editable copy of the graph with constants folded and lifted, and BatchNormalization folded away.

    Interface, opset, metadata and doc strings stay. Nodes that feed nothing are gone.

    Parameters
    ----------
    proto : onnx.ModelProto
        As :func:`xdonnx.model.read_proto` returns it; not changed.
    """
    model = ir.from_proto(_without_initializer_inputs(proto))
    if model.functions:
        common.InlinePass()(model)
    model = _fold_constants(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for node in list(model.graph):
        if node.op_type == "BatchNormalization" and node.domain in ("", "ai.onnx"):
            _fold_batch_norm(node)
    common.RemoveUnusedNodesPass()(model)
    _give_each_reader_its_own(model.graph)
    return model


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of a value that is an initializer, else None."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def free_name(graph: ir.Graph, wanted: str) -> str:
    """Return the wanted name for a value, or that name with a number where it is taken."""
    taken = {v.name for node in graph for v in node.outputs} | set(graph.initializers)
    taken |= {v.name for v in graph.inputs}
    name, number = wanted, 1
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    return name


def add_initializer(graph: ir.Graph, wanted: str, array: np.ndarray) -> ir.Value:
    """Add an initializer under the wanted name, or that name with a number where it is taken."""
    name = free_name(graph, wanted)
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def set_array(value: ir.Value, array: np.ndarray) -> None:
    """Give an initializer another array, keeping its name and dtype."""
    assert value.const_value is not None
    array = np.ascontiguousarray(array.astype(value.const_value.numpy().dtype, copy=False))
    value.const_value = ir.tensor(array, name=value.name)
    value.shape = ir.Shape(array.shape)


def _without_initializer_inputs(proto: onnx.ModelProto) -> onnx.ModelProto:
    held = {tensor.name for tensor in proto.graph.initializer}
    if not any(value.name in held for value in proto.graph.input):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    kept = [value for value in copy.graph.input if value.name not in held]
    del copy.graph.input[:]
    copy.graph.input.extend(kept)
    # Up to IR version 3 every initializer had to be an input as well.
    copy.ir_version = max(copy.ir_version, 4)
    return copy


def _give_each_reader_its_own(graph: ir.Graph) -> None:
    """Undo the sharing of small constants: equal biases of unrelated layers are not one parameter.

    A weight that two layers share is meant, and stays shared.
    """
    for name, value in list(graph.initializers.items()):
        array = constant(value)
        if array is None or not 0 < array.size <= _SMALL:
            continue
        uses = list(value.uses())
        # A bias is the first to move: whatever else reads the array is not to change with it.
        keeper = next((use for use in uses if not _is_bias(*use)), uses[0] if uses else None)
        for user, position in uses:
            if (user, position) == keeper or user.graph is not graph:
                continue
            weight = position == 1 and user.op_type in (*_FOLDABLE_INTO, "MatMul")
            # Of single numbers a bias alone is a parameter; the others are factors, limits and the like.
            if weight or (array.size == 1 and not _is_bias(user, position)):
                continue
            own = add_initializer(graph, f"{name}_of_{user.outputs[0].name}", array)
            user.replace_input_with(position, own)


def _is_bias(user: ir.Node, position: int) -> bool:
    return position == 2 and user.op_type in _FOLDABLE_INTO


def _fold_constants(model: ir.Model) -> ir.Model:
    folded = model.clone()
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        optimizer.fold_constants(folded, should_fold=lambda node: node.op_type not in _KEEP, output_size_limit=2**31)
    except RuntimeError:
        # The folder evaluates nodes with a reference implementation that knows fewer operators than onnxruntime.
        # An unfolded graph is as correct; it only leaves more channels unexplained.
        return model
    finally:
        logger.setLevel(level)
    same = [v.name for v in folded.graph.outputs] == [v.name for v in model.graph.outputs]
    return folded if same else model


def _fold_batch_norm(node: ir.Node) -> None:
    source = node.inputs[0]
    layer = source.producer() if source is not None else None
    if layer is None or layer.op_type not in _FOLDABLE_INTO or layer.domain not in ("", "ai.onnx"):
        return
    assert source is not None
    if source.is_graph_output() or len(source.uses()) != 1 or (len(node.outputs) > 1 and node.outputs[1].uses()):
        return
    training = node.attributes.get("training_mode")
    if training is not None and training.as_int():
        return
    parameters = [constant(value) for value in node.inputs[1:5]]
    weight_value = layer.inputs[1]
    weight = constant(weight_value)
    bias_value = layer.inputs[2] if len(layer.inputs) > 2 else None
    bias = constant(bias_value)
    if weight is None or any(p is None or p.ndim != 1 for p in parameters) or (bias_value is not None and bias is None):
        return
    axis = _output_axis(layer)
    if axis is None:
        return
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    scale, shift, mean, variance = (np.asarray(p, np.float64) for p in parameters)
    gain = scale / np.sqrt(variance + epsilon)
    offset = np.zeros_like(gain) if bias is None else np.asarray(bias, np.float64)
    if layer.op_type == "Gemm" and offset.shape != gain.shape:
        return
    shape = [1] * weight.ndim
    shape[axis] = -1
    rows = gain
    if layer.op_type == "ConvTranspose":
        # Weight (C, O/g, k): every group has its own O/g outputs.
        groups = layer.attributes["group"].as_int() if "group" in layer.attributes else 1
        if groups > 1:
            blocks = weight.reshape(groups, -1, *weight.shape[1:])
            scaled = blocks * gain.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
            _store(layer, scaled.reshape(weight.shape), gain * (offset - mean) + shift, node)
            return
    _store(layer, weight * rows.reshape(shape), gain * (offset - mean) + shift, node)


def _output_axis(layer: ir.Node) -> int | None:
    if layer.op_type == "Conv":
        return 0
    if layer.op_type == "ConvTranspose":
        return 1
    trans = "transB" in layer.attributes and layer.attributes["transB"].as_int()
    plain = all(name not in layer.attributes or layer.attributes[name].as_float() == 1.0 for name in ("alpha", "beta"))
    return (0 if trans else 1) if plain else None


def _store(layer: ir.Node, weight: np.ndarray, bias: np.ndarray, norm: ir.Node) -> None:
    """Give the layer its own folded weight and bias, and the normalization's output name."""
    graph = layer.graph
    assert graph is not None
    weight_value = layer.inputs[1]
    assert weight_value is not None and weight_value.const_value is not None
    dtype = weight_value.const_value.numpy().dtype
    if len(weight_value.uses()) == 1:
        set_array(weight_value, weight)
    else:
        layer.replace_input_with(1, add_initializer(graph, f"{weight_value.name}_folded", weight.astype(dtype)))
    bias_value = layer.inputs[2] if len(layer.inputs) > 2 else None
    shift_value = norm.inputs[2]
    assert shift_value is not None
    if bias_value is not None and len(bias_value.uses()) == 1:
        set_array(bias_value, bias)
    elif bias_value is not None:
        layer.replace_input_with(2, add_initializer(graph, f"{bias_value.name}_folded", bias.astype(dtype)))
    else:
        # The normalization's shift becomes the layer's bias, so it lends the name that users know.
        fresh = add_initializer(graph, f"{shift_value.name}_folded", bias.astype(dtype))
        layer.resize_inputs(3)
        layer.replace_input_with(2, fresh)
    kept, old = norm.outputs[0], layer.outputs[0]
    was_output = kept.is_graph_output()
    name = kept.name
    kept.replace_all_uses_with(old, replace_graph_outputs=was_output)
    if was_output:
        old.shape, old.type = kept.shape, kept.type
    graph.remove(norm, safe=True)
    kept.name = None
    old.name = name
