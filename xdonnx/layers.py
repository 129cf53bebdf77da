"""The layers that make channels: what they read, what they make, how they unroll; and the rules of their labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xdonnx.errors import ModelError
from xdonnx.labels import Ids, Labels, Track, int_attribute, list_attribute, text_attribute
from xdonnx.prepare import constant


@dataclass(frozen=True)
class Layer:
    """A convolution, transposed convolution or product with a constant weight, named by the value it makes.

    Parameters
    ----------
    name, node, op : str
        The value it makes, its node's name (may be empty), 'Conv' | 'ConvTranspose' | 'Gemm' | 'MatMul'.
    input, weight : str
        The value it reads and its weight's initializer; `bias` is None where it has none.
    groups : int
    kernel, strides, dilations, pads, output_padding : tuple of int
        Pads are all begins, then all ends, as ONNX writes them; empty for Gemm and MatMul.
    transposed : bool
        Whether a Gemm or MatMul stores its weight as (inputs, outputs).
    out_ids : (outputs,) int
        Label of each output channel.
    columns : (inputs / groups * kernel,) int
        Label of each column of the weight unrolled to a matrix.
    positions : int
        Output positions of one sample.
    macs, params : int
    """

    name: str
    node: str
    op: str
    input: str
    weight: str
    bias: str | None
    groups: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool
    out_ids: Ids
    columns: Ids
    positions: int
    macs: int
    params: int

    @property
    def depthwise(self) -> bool:
        """Whether every group reads one channel, so that it hands channels on rather than mixing them."""
        return self.groups > 1 and len(self.columns) == int(np.prod(self.kernel))


def conv(labels: Labels, node: ir.Node) -> Layer | None:
    """Conv: fresh labels for what it makes; a depthwise one hands its input's labels on."""
    found = _reading(labels, node)
    if found is None:
        return None
    weight, shape, made, ids = found
    name = str(node.outputs[0].name)
    groups = int_attribute(node, "group", 1)
    outputs = weight.shape[0]
    kernel = weight.shape[2:]
    if groups > 1 and weight.shape[1] == 1:
        out_ids = np.repeat(ids, outputs // groups)
        labels.count_attribute(node, "group", None, ids)
        read = np.array([-1])
    else:
        read = _tie_groups(labels, ids, groups)
        out_ids = labels.fresh(outputs)
        _tie_groups(labels, out_ids, groups)
        labels.slot(node, _input(node, 1), 1, read, role="read")
    labels.slot(node, _input(node, 1), 0, out_ids)
    bias = _bias(labels, node, 2, out_ids)
    labels.follow(node.outputs[0], Track(1, out_ids))
    strides, dilations, pads = _window(node, shape, made, kernel)
    return Layer(
        name=name,
        node=node.name or "",
        op="Conv",
        input=str(_input(node, 0).name),
        weight=str(_input(node, 1).name),
        bias=bias,
        groups=groups,
        kernel=kernel,
        strides=strides,
        dilations=dilations,
        pads=pads,
        output_padding=(),
        transposed=False,
        out_ids=out_ids,
        columns=np.repeat(read, int(np.prod(kernel))),
        positions=int(np.prod(made[2:])),
        macs=int(np.prod(made[2:])) * weight.size,
        params=weight.size + (outputs if bias else 0),
    )


def conv_transpose(labels: Labels, node: ir.Node) -> Layer | None:
    """ConvTranspose: as Conv, with the weight's axes the other way round."""
    found = _reading(labels, node)
    if found is None:
        return None
    weight, shape, made, ids = found
    name = str(node.outputs[0].name)
    groups = int_attribute(node, "group", 1)
    per_group = weight.shape[1]
    kernel = weight.shape[2:]
    depthwise = groups > 1 and shape[1] == groups
    if depthwise:
        out_ids = np.repeat(ids, per_group)
        labels.count_attribute(node, "group", None, ids)
        read = np.array([-1])
    else:
        read = _tie_groups(labels, ids, groups)
        out_ids = labels.fresh(groups * per_group)
        labels.slot(node, _input(node, 1), 1, _tie_groups(labels, out_ids, groups))
    labels.slot(node, _input(node, 1), 0, ids, role="own" if depthwise else "read")
    bias = _bias(labels, node, 2, out_ids)
    labels.follow(node.outputs[0], Track(1, out_ids))
    strides = tuple(list_attribute(node, "strides") or [1] * len(kernel))
    dilations = tuple(list_attribute(node, "dilations") or [1] * len(kernel))
    extra = tuple(list_attribute(node, "output_padding") or [0] * len(kernel))
    pads = _transposed_pads(node, shape, made, kernel, strides, dilations, extra)
    return Layer(
        name=name,
        node=node.name or "",
        op="ConvTranspose",
        input=str(_input(node, 0).name),
        weight=str(_input(node, 1).name),
        bias=bias,
        groups=groups,
        kernel=kernel,
        strides=strides,
        dilations=dilations,
        pads=pads,
        output_padding=extra,
        transposed=False,
        out_ids=out_ids,
        columns=np.repeat(read, int(np.prod(kernel))),
        positions=int(np.prod(made[2:])),
        macs=int(np.prod(shape[2:])) * weight.size,
        params=weight.size + (len(out_ids) if bias else 0),
    )


def product(labels: Labels, node: ir.Node) -> Layer | None:
    """Gemm and MatMul with a constant: the last axis is contracted, fresh labels for what is made."""
    weight = constant(node.inputs[1])
    shape = labels.shape(node.inputs[0])
    name = str(node.outputs[0].name)
    gemm = node.op_type == "Gemm"
    usable = weight is not None and weight.ndim == 2 and shape is not None and len(shape) >= 2
    if not usable or int_attribute(node, "transA", 0):
        labels.pin_node(node, f"{node.op_type} '{name}' is not a product with a constant matrix")
        return None
    assert weight is not None and shape is not None
    axis = len(shape) - 1
    stored_outputs_first = bool(gemm and int_attribute(node, "transB", 0))
    ids = labels.along(_input(node, 0), axis, name)
    if ids is None:
        # Channels lie along another axis: this product mixes positions and hands channels on untouched.
        if gemm:
            labels.pin_node(node, f"Gemm '{name}' has them along its rows")
            return None
        labels.follow(node.outputs[0], labels.track(node.inputs[0]))
        return None
    out_ids = labels.fresh(weight.shape[0 if stored_outputs_first else 1])
    labels.slot(node, _input(node, 1), 1 if stored_outputs_first else 0, ids, role="read")
    labels.slot(node, _input(node, 1), 0 if stored_outputs_first else 1, out_ids)
    plain = all(name not in node.attributes or node.attributes[name].as_float() == 1.0 for name in ("alpha", "beta"))
    bias = _bias(labels, node, 2, out_ids) if gemm else None
    labels.follow(node.outputs[0], Track(axis, out_ids))
    if not plain or (gemm and len(node.inputs) > 2 and node.inputs[2] is not None and bias is None):
        return None
    positions = max(1, int(np.prod(shape[:-1])) // labels.batch)
    return Layer(
        name=name,
        node=node.name or "",
        op=node.op_type,
        input=str(_input(node, 0).name),
        weight=str(_input(node, 1).name),
        bias=bias,
        groups=1,
        kernel=(),
        strides=(),
        dilations=(),
        pads=(),
        output_padding=(),
        transposed=not stored_outputs_first,
        out_ids=out_ids,
        columns=ids,
        positions=positions,
        macs=positions * weight.size,
        params=weight.size + (len(out_ids) if bias else 0),
    )


LAYERS = {"Conv": conv, "ConvTranspose": conv_transpose, "Gemm": product, "MatMul": product}


def _reading(labels: Labels, node: ir.Node) -> tuple[np.ndarray, tuple[int, ...], tuple[int, ...], Ids] | None:
    """Return a convolution's weight, its shapes in and out, and the labels it reads; None where it cannot be cut."""
    weight = constant(node.inputs[1])
    shape, made = labels.shape(node.inputs[0]), labels.shape(node.outputs[0])
    name = str(node.outputs[0].name)
    if weight is None or shape is None or made is None:
        why = "its weight is computed by the graph" if weight is None else "its shape is not known"
        labels.pin_node(node, f"'{name}' cannot be cut: {why}")
        return None
    transposed = node.op_type == "ConvTranspose"
    wanted = weight.shape[0] if transposed else weight.shape[1] * int_attribute(node, "group", 1)
    if shape[1] != wanted:
        raise ModelError(
            f"{node.op_type} '{name}' reads {shape[1]} channels, and its weight is made for {wanted}.\n"
            "  Export the model again."
        )
    ids = labels.along(_input(node, 0), 1, name)
    if ids is None:
        labels.pin_node(node, f"'{name}' reads channels along an axis that is not its own")
        ids = labels.fresh(shape[1], pin=f"'{name}' cannot be cut")
    return weight, shape, made, ids


def _input(node: ir.Node, at: int) -> ir.Value:
    value = node.inputs[at]
    assert value is not None
    return value


def _tie_groups(labels: Labels, ids: Ids, groups: int) -> Ids:
    """Tie channel j of every group, so that all groups stay equally wide; return one group's labels."""
    grid = ids.reshape(groups, -1)
    for row in grid[1:]:
        labels.tie(grid[0], row)
    first: Ids = grid[0]
    return first


def _bias(labels: Labels, node: ir.Node, at: int, out_ids: Ids) -> str | None:
    value = node.inputs[at] if len(node.inputs) > at else None
    if value is None:
        return None
    array = constant(value)
    if array is None:
        track = labels.track(value)
        if track is not None and len(track.ids) == len(out_ids):
            labels.tie(track.ids, out_ids)
        else:
            labels.pin(out_ids, f"the bias of '{node.outputs[0].name}' is computed by the graph")
        return None
    if array.size == len(out_ids) and array.shape[-1] == array.size:
        labels.slot(node, value, array.ndim - 1, out_ids)
        return str(value.name) if array.ndim == 1 else None
    if array.size != 1:
        labels.pin(out_ids, f"the bias of '{node.outputs[0].name}' has an unusual shape")
    return None


Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _window(node: ir.Node, shape: tuple[int, ...], made: tuple[int, ...], kernel: tuple[int, ...]) -> Window:
    strides = tuple(list_attribute(node, "strides") or [1] * len(kernel))
    dilations = tuple(list_attribute(node, "dilations") or [1] * len(kernel))
    mode = text_attribute(node, "auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        pads = list_attribute(node, "pads") if mode == "NOTSET" else None
        return strides, dilations, tuple(pads or [0] * 2 * len(kernel))
    spare = [
        max((m - 1) * s + (k - 1) * d + 1 - n, 0)
        for n, m, k, s, d in zip(shape[2:], made[2:], kernel, strides, dilations, strict=True)
    ]
    less, more = [p // 2 for p in spare], [p - p // 2 for p in spare]
    return strides, dilations, tuple(less + more if mode == "SAME_UPPER" else more + less)


def _transposed_pads(
    node: ir.Node,
    shape: tuple[int, ...],
    made: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    extra: tuple[int, ...],
) -> tuple[int, ...]:
    mode = text_attribute(node, "auto_pad", "NOTSET")
    stated = list_attribute(node, "output_shape")
    if stated is None and mode in ("NOTSET", "VALID"):
        pads = list_attribute(node, "pads") if mode == "NOTSET" else None
        return tuple(pads or [0] * 2 * len(kernel))
    spare = [
        s * (n - 1) + e + (k - 1) * d + 1 - m
        for n, m, k, s, d, e in zip(shape[2:], made[2:], kernel, strides, dilations, extra, strict=True)
    ]
    less, more = [p // 2 for p in spare], [p - p // 2 for p in spare]
    return tuple(less + more if mode == "SAME_UPPER" else more + less)
