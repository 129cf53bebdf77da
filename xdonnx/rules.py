"""What every operator does to channel labels; an operator without a rule pins what it reads."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from xdonnx.labels import Labels, Track, input_or_attribute, int_attribute
from xdonnx.prepare import constant
from xdonnx.reshaping import RESHAPING

Rule = Callable[[Labels, ir.Node], None]

# Sums of channels from different layers are streams (residual connections); products are gates.
_SUMS = {"Add", "Sub", "Sum", "Mean", "Max", "Min", "Where"}
_ELEMENTWISE = {
    *_SUMS, "Mul", "Div", "Pow", "PRelu", "Mod", "And", "Or", "Xor", "Equal", "Greater", "Less",
    "GreaterOrEqual", "LessOrEqual", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor",
    "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Clip", "HardSigmoid", "HardSwish", "Elu", "Selu", "Celu",
    "Softplus", "Softsign", "ThresholdedRelu", "Mish", "Gelu", "Swish", "Erf", "Exp", "Log", "Sqrt", "Abs", "Neg",
    "Reciprocal", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh",
    "Asinh", "Acosh", "Atanh", "Not", "IsNaN", "IsInf", "Identity", "Dropout", "Cast", "Shrink",
}  # fmt: skip
_POOLS = {"MaxPool", "AveragePool", "LpPool", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"}
_REDUCTIONS = {
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare",
}  # fmt: skip
_ALONG_AXIS = {"Softmax", "LogSoftmax", "Hardmax", "ArgMax", "ArgMin", "CumSum"}


def elementwise(labels: Labels, node: ir.Node) -> None:
    """Tie the operands' channels; a constant with one entry a channel bears their labels."""
    made = labels.shape(node.outputs[0])
    known = [(v, t) for v in node.inputs if v is not None and (t := labels.track(v)) is not None]
    if not known:
        return
    name = str(node.outputs[0].name)
    shapes = {id(v): labels.shape(v) for v in node.inputs if v is not None}
    if any(shape is None for shape in shapes.values()):
        labels.pin_node(node, f"a shape at {node.op_type} '{name}' is not known")
        return
    if made is None:
        ranks = [len(s) for s in shapes.values() if s is not None]
        made = next(s for s in shapes.values() if s is not None and len(s) == max(ranks))

    def moved(value: ir.Value, axis: int) -> int:
        shape = shapes[id(value)]
        assert shape is not None and made is not None
        return axis + len(made) - len(shape)

    axes = {moved(v, t.axis) for v, t in known}
    if len(axes) > 1:
        labels.pin_node(node, f"{node.op_type} '{name}' combines channels of different axes")
        return
    axis = axes.pop()
    wide = [(v, t) for v, t in known if len(t.ids) == made[axis]]
    if not wide:
        labels.pin_node(node, f"{node.op_type} '{name}' spreads one channel over many")
        return
    ids = wide[0][1].ids
    stream = f"added at {node.op_type} '{name}'" if node.op_type in _SUMS else None
    for value in node.inputs:
        shape = shapes[id(value)] if value is not None else None
        if value is None or shape is None:
            continue
        own = axis - len(made) + len(shape)
        if own < 0 or (shape[own] == 1 and made[axis] != 1):
            if (track := labels.track(value)) is not None:
                labels.pin(track.ids, f"{node.op_type} '{name}' spreads one channel over many")
            continue
        track = labels.track(value)
        if track is not None:
            labels.tie(ids, track.ids, stream=stream)
        elif constant(value) is not None:
            labels.slot(node, value, own, ids)
        else:
            labels.pin(ids, f"{node.op_type} '{name}' combines them with '{value.name}', which has none that can go")
    labels.follow(node.outputs[0], Track(axis, ids))
    if len(node.outputs) > 1:  # Dropout's mask
        labels.follow(node.outputs[1], Track(axis, ids))


def pool(labels: Labels, node: ir.Node) -> None:
    """Pooling keeps channels apart."""
    track = labels.track(node.inputs[0])
    if track is None:
        return
    indices = len(node.outputs) > 1 and bool(node.outputs[1].uses() or node.outputs[1].is_graph_output())
    if track.axis > 1 or indices:
        labels.pin_node(node, f"{node.op_type} '{node.outputs[0].name}' pools over channels or numbers them")
        return
    labels.follow(node.outputs[0], track)


def reduction(labels: Labels, node: ir.Node) -> None:
    """A reduction over other axes keeps channels apart."""
    track = labels.track(node.inputs[0])
    shape = labels.shape(node.inputs[0])
    if track is None:
        return
    name = node.outputs[0].name
    axes = input_or_attribute(node, 1, "axes")
    given = len(node.inputs) > 1 and node.inputs[1] is not None
    if shape is None or (axes is None and given):
        labels.pin_node(node, f"{node.op_type} '{name}' computes its axes")
        return
    if not axes:
        if int_attribute(node, "noop_with_empty_axes", 0):
            labels.follow(node.outputs[0], track)
            return
        axes = list(range(len(shape)))
    axes = [axis % len(shape) for axis in axes]
    if track.axis in axes:
        labels.pin_node(node, f"{node.op_type} '{name}' mixes all channels")
        return
    gone = 0 if int_attribute(node, "keepdims", 1) else sum(axis < track.axis for axis in axes)
    labels.follow(node.outputs[0], Track(track.axis - gone, track.ids))


def along_axis(labels: Labels, node: ir.Node) -> None:
    """Softmax and its kin keep channels apart when they run along another axis."""
    track = labels.track(node.inputs[0])
    shape = labels.shape(node.inputs[0])
    if track is None:
        return
    name = node.outputs[0].name
    arg = node.op_type.startswith("Arg")
    modern = labels.opset() >= 13 or arg or node.op_type == "CumSum"
    axis = int_attribute(node, "axis", 0 if arg else (-1 if modern else 1))
    if node.op_type == "CumSum":
        found = constant(node.inputs[1])
        axis = track.axis if found is None else int(found.reshape(-1)[0])
    if shape is None:
        labels.pin_node(node, f"the shape at {node.op_type} '{name}' is not known")
        return
    axis %= len(shape)
    # Before opset 13 Softmax ran over all axes from `axis` on.
    if track.axis == axis or (not modern and track.axis >= axis):
        labels.pin_node(node, f"{node.op_type} '{name}' runs along them")
        return
    gone = arg and not int_attribute(node, "keepdims", 1) and axis < track.axis
    labels.follow(node.outputs[0], Track(track.axis - int(gone), track.ids))


def normalization(labels: Labels, node: ir.Node) -> None:
    """BatchNormalization and InstanceNormalization: one parameter a channel."""
    track = labels.track(node.inputs[0])
    if track is None:
        return
    parameters = node.inputs[1:]
    arrays = [constant(value) for value in parameters]
    if track.axis != 1 or any(array is None or array.shape != (len(track.ids),) for array in arrays):
        labels.pin_node(node, f"{node.op_type} '{node.outputs[0].name}' computes its parameters")
        return
    for value in parameters:
        assert value is not None
        labels.slot(node, value, 0, track.ids)
    labels.follow(node.outputs[0], track)


def layer_normalization(labels: Labels, node: ir.Node) -> None:
    """LayerNormalization keeps channels apart when they lie before the axes it runs over."""
    track = labels.track(node.inputs[0])
    shape = labels.shape(node.inputs[0])
    if track is None:
        return
    axis = int_attribute(node, "axis", -1)
    if shape is None or track.axis >= axis % len(shape):
        labels.pin_node(node, f"{node.op_type} '{node.outputs[0].name}' takes its statistics over them")
        return
    labels.follow(node.outputs[0], track)


def size(labels: Labels, node: ir.Node) -> None:
    """Shape: harmless while nobody computes with the number of channels."""
    track = labels.track(node.inputs[0])
    shape = labels.shape(node.inputs[0])
    if track is None:
        return
    if shape is not None:
        said = range(len(shape))[int_attribute(node, "start", 0) : int_attribute(node, "end", len(shape))]
        if track.axis not in said or _ignores(labels, node.outputs[0], track.axis - said.start):
            return
    labels.pin(track.ids, f"Shape '{node.outputs[0].name}' lets the graph compute with their number")


def _ignores(labels: Labels, value: ir.Value, entry: int) -> bool:
    """Whether no reader of a shape looks at this entry."""
    for user, _ in value.uses():
        if user.op_type == "Cast":
            if not _ignores(labels, user.outputs[0], entry):
                return False
        elif user.op_type == "Gather":
            picked = constant(user.inputs[1])
            rank = (labels.shape(value) or (0,))[0]
            if picked is None or any(int(i) % max(rank, 1) == entry for i in picked.reshape(-1)):
                return False
        elif user.op_type == "Slice":
            starts, ends = (input_or_attribute(user, at, n) for at, n in ((1, "starts"), (2, "ends")))
            steps = input_or_attribute(user, 4, "steps") or [1]
            rank = (labels.shape(value) or (0,))[0]
            if not starts or not ends or entry in range(rank)[slice(starts[0], ends[0], steps[0])]:
                return False
        else:
            return False
    return not value.is_graph_output()


def subgraph(labels: Labels, node: ir.Node) -> None:
    """Control flow: its bodies read outer values by name, so all of those stay whole."""
    reason = f"{node.op_type} '{node.outputs[0].name}' holds a graph of its own"
    labels.pin_node(node, reason)
    for attribute in node.attributes.values():
        if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        bodies = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs()
        for body in bodies:
            for inner in ir.traversal.RecursiveGraphIterator(body):
                labels.pin_node(inner, reason)
            for value in body.outputs:
                labels.pin_value(value, reason)


RULES: dict[str, Rule] = {
    **RESHAPING,
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(_POOLS, pool),
    **dict.fromkeys(_REDUCTIONS, reduction),
    **dict.fromkeys(_ALONG_AXIS, along_axis),
    "BatchNormalization": normalization,
    "InstanceNormalization": normalization,
    "LayerNormalization": layer_normalization,
    "Shape": size,
}


def unknown(labels: Labels, node: ir.Node) -> None:
    """Pin what an operator without a rule reads."""
    domain = f"{node.domain}." if node.domain not in ("", "ai.onnx") else ""
    labels.pin_node(node, f"{domain}{node.op_type} '{node.outputs[0].name}' is not followed")


def rule_for(node: ir.Node) -> Rule:
    """Return the rule of a node that is no layer."""
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return subgraph
    if node.domain not in ("", "ai.onnx"):
        return unknown
    if "broadcast" in node.attributes:
        return unknown  # opset below 7 aligns operands by another rule
    return RULES.get(node.op_type, unknown)
