"""Students as other tools leave them: convolutions decomposed, values renamed, nodes in another order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray
# What one convolution becomes: for each in its place the weight, and which of the axes keep the window, 'h' and 'w'.
Factors = list[tuple[Array, str, int]]


def spatial(weight: Array, share: float) -> Factors:
    """Factor k x k into k x 1, then 1 x k, by the SVD of (inputs x rows) against (outputs x columns)."""
    outputs, inputs, high, wide = weight.shape
    u, s, v = np.linalg.svd(weight.transpose(1, 2, 0, 3).reshape(inputs * high, outputs * wide), full_matrices=False)
    rank = max(1, round(share * len(s)))
    root = np.sqrt(s[:rank])
    first = (u[:, :rank] * root).T.reshape(rank, inputs, high, 1)
    second = (root[:, None] * v[:rank]).reshape(rank, outputs, 1, wide).transpose(1, 0, 2, 3)
    return [(first, "h", 1), (second, "w", 1)]


def tucker(weight: Array, share: float) -> Factors:
    """Factor into 1 x 1, k x k on fewer channels, 1 x 1, by the leading singular vectors of both unfoldings."""
    outputs, inputs = weight.shape[:2]
    u = np.linalg.svd(weight.reshape(outputs, -1), full_matrices=False)[0][:, : max(1, round(share * outputs))]
    unfolded = weight.transpose(1, 0, 2, 3).reshape(inputs, -1)
    v = np.linalg.svd(unfolded, full_matrices=False)[0][:, : max(1, round(share * inputs))]
    core = np.einsum("oihw,or,is->rshw", weight, u, v)
    return [(v.T[:, :, None, None], "", 1), (core, "hw", 1), (u[:, :, None, None], "", 1)]


def separable(weight: Array, share: float) -> Factors:
    """Factor into a depthwise k x k and a 1 x 1: for each input channel the best product of a kernel and a column."""
    del share
    inputs, high, wide = weight.shape[1:]
    kernels, columns = [], []
    for at in range(inputs):
        u, s, v = np.linalg.svd(weight[:, at].reshape(len(weight), -1), full_matrices=False)
        kernels.append(v[0].reshape(1, high, wide) * np.sqrt(s[0]))
        columns.append(u[:, 0] * np.sqrt(s[0]))
    return [(np.stack(kernels), "hw", inputs), (np.stack(columns, 1)[:, :, None, None], "", 1)]


def decomposed(
    model: onnx.ModelProto, factor: Callable[[Array, float], Factors], share: float, skip: Sequence[str] = ()
) -> tuple[onnx.ModelProto, dict[str, list[str]]]:
    """Return a model with every convolution of a window and one group factored, and {value: values of its row}."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in copy.graph.initializer}
    nodes, made = [], {}
    for node in model.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        array = numpy_helper.to_array(weights[node.input[1]]) if node.op_type == "Conv" else np.zeros(())
        plain = array.ndim == 4 and attributes.get("group", 1) == 1 and array.shape[2] > 1
        if not plain or node.output[0] in skip:
            nodes.append(node)
            continue
        value, names = node.input[0], []
        parts = factor(array.astype(np.float64), share)
        for at, (weight, axes, groups) in enumerate(parts):
            last = at == len(parts) - 1
            name = node.output[0] if last else f"{node.output[0]}_part{at}"
            weight_name = f"{name}_weight{at}"
            copy.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), weight_name))
            nodes.append(
                helper.make_node(
                    "Conv", [value, weight_name, *(node.input[2:] if last else ())], [name], name=f"{name}_node",
                    group=groups, kernel_shape=weight.shape[2:], **_window(attributes, axes),
                )
            )  # fmt: skip
            names.append(name)
            value = name
        made[node.output[0]] = names
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    del copy.graph.value_info[:]
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in copy.graph.initializer if tensor.name in used]
    kept = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    onnx.checker.check_model(copy)
    return copy, made


def _window(attributes: Mapping[str, object], axes: str) -> dict[str, list[int]]:
    """Return pads and strides of a factor that sees the window along some axes only."""
    pads, strides = attributes.get("pads", [0] * 4), attributes.get("strides", [1, 1])
    assert isinstance(pads, list) and isinstance(strides, list)
    sees = ["h" in axes, "w" in axes]
    return {
        "pads": [pad if see else 0 for pad, see in zip(pads, sees * 2, strict=True)],
        "strides": [stride if see else 1 for stride, see in zip(strides, sees, strict=True)],
    }


def disguised(model: onnx.ModelProto, seed: int = 0) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Return a model with every inner name replaced and the nodes in a random valid order, and {old: new value}."""
    random = np.random.default_rng(seed)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    ports = {value.name for value in (*copy.graph.input, *copy.graph.output)}
    values = [name for node in copy.graph.node for name in node.output if name]
    values += [tensor.name for tensor in copy.graph.initializer]
    inner = [name for name in dict.fromkeys(values) if name not in ports]
    renamed = {name: f"x{number}" for name, number in zip(inner, random.permutation(len(inner)), strict=True)}
    for node in copy.graph.node:
        node.name = f"n{random.integers(1 << 30)}"
        for names in (node.input, node.output):
            for at, name in enumerate(names):
                names[at] = renamed.get(name, name)
    for tensor in copy.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    del copy.graph.value_info[:]
    waiting = [onnx.NodeProto.FromString(node.SerializeToString()) for node in copy.graph.node]
    there = {tensor.name for tensor in copy.graph.initializer} | {value.name for value in copy.graph.input} | {""}
    del copy.graph.node[:]
    while waiting:
        ready = [node for node in waiting if there.issuperset(node.input)]
        chosen = ready[int(random.integers(len(ready)))]
        waiting.remove(chosen)
        there.update(chosen.output)
        copy.graph.node.append(chosen)
    onnx.checker.check_model(copy)
    return copy, {name: renamed.get(name, name) for name in values}
