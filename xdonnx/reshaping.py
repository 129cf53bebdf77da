"""How labels pass through operators that move, cut, join or repeat channels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xdonnx.labels import (
    Ids,
    Labels,
    Track,
    input_or_attribute,
    int_attribute,
    list_attribute,
    text_attribute,
)
from xdonnx.prepare import add_initializer, constant

# A reshape of a value larger than this is not followed: labels are laid over the whole value to follow it.
_LARGEST = 1 << 26


def _spread(labels: Labels, node: ir.Node) -> np.ndarray | None:
    """Lay a node's input labels over its whole output shape; None where a shape is unknown."""
    track = labels.track(node.inputs[0])
    before, after = labels.shape(node.inputs[0]), labels.shape(node.outputs[0])
    if track is None or before is None or after is None:
        return None
    if np.prod(before) != np.prod(after) or np.prod(before) > _LARGEST or np.prod(before) == 0:
        return None
    along = [1] * len(before)
    along[track.axis] = -1
    return np.broadcast_to(track.ids.reshape(along), before).reshape(after)


def reshape(labels: Labels, node: ir.Node) -> None:
    """Reshape: labels go where their elements go; the target's channel entry is a count."""
    if labels.track(node.inputs[0]) is None:
        return
    spread = _spread(labels, node)
    name = node.outputs[0].name
    if spread is None:
        labels.pin_node(node, f"the shape at Reshape '{name}' is not known")
        return
    before, track = labels.track(node.inputs[0]), labels.regular(spread)
    assert before is not None
    target = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    copied = set() if target is None else set(np.flatnonzero(target == 0).tolist())
    if before.axis != track.axis and copied & {before.axis, track.axis}:
        labels.pin_node(node, f"Reshape '{name}' copies a size from one axis to another")
        return
    stated = len(node.inputs) > 1
    if stated and not labels.count_input(node, 1, track.axis, track.ids, inferred=(0, -1)):
        labels.pin(track.ids, f"Reshape '{name}' computes its shape")
    # Below opset 5 the target is an attribute.
    elif not stated and (list_attribute(node, "shape") or [0] * len(spread.shape))[track.axis] > 0:
        labels.count_attribute(node, "shape", track.axis, track.ids)
    labels.follow(node.outputs[0], track)


def flatten(labels: Labels, node: ir.Node) -> None:
    """Flatten, Squeeze, Unsqueeze: the same elements in another shape that follows by itself."""
    if labels.track(node.inputs[0]) is None:
        return
    if node.op_type == "Squeeze" and input_or_attribute(node, 1, "axes") is None:
        # Without axes it drops whatever has size 1, which a channel axis may come to have.
        labels.pin_node(node, f"Squeeze '{node.outputs[0].name}' names no axes")
        return
    spread = _spread(labels, node)
    if spread is None:
        labels.pin_node(node, f"the shape at {node.op_type} '{node.outputs[0].name}' is not known")
        return
    labels.follow(node.outputs[0], labels.regular(spread))


def transpose(labels: Labels, node: ir.Node) -> None:
    """Transpose: the channel axis moves."""
    track = labels.track(node.inputs[0])
    shape = labels.shape(node.inputs[0])
    if track is None or shape is None:
        labels.pin_node(node, "its rank is not known at a Transpose")
        return
    order = list_attribute(node, "perm") or list(range(len(shape)))[::-1]
    labels.follow(node.outputs[0], Track(order.index(track.axis), track.ids))


def concat(labels: Labels, node: ir.Node) -> None:
    """Concat: along the channel axis labels are joined, along another they are tied."""
    tracks = [labels.track(value) for value in node.inputs]
    known = [t for t in tracks if t is not None]
    if not known:
        return
    name = str(node.outputs[0].name)
    shapes = [labels.shape(value) for value in node.inputs]
    if any(shape is None for shape in shapes):
        labels.pin_node(node, f"a shape at Concat '{name}' is not known")
        return
    rank = len(shapes[0] or ())
    axis = int_attribute(node, "axis", 1) % rank
    if all(t.axis == axis for t in known):
        parts: list[Ids] = []
        for value in node.inputs:
            assert value is not None
            ids = labels.along(value, axis, name)
            assert ids is not None
            parts.append(ids)
        labels.follow(node.outputs[0], Track(axis, np.concatenate(parts)))
    elif all(t is not None and t.axis == known[0].axis for t in tracks):
        for other in known[1:]:
            labels.tie(known[0].ids, other.ids, stream=f"joined at Concat '{name}'")
        labels.follow(node.outputs[0], known[0])
    else:
        labels.pin_node(node, f"Concat '{name}' joins channels with something else")


def split(labels: Labels, node: ir.Node) -> None:
    """Split: each output takes its run of labels; the sizes are counts."""
    track = labels.track(node.inputs[0])
    if track is None:
        return
    shape = labels.shape(node.inputs[0])
    name = node.outputs[0].name
    if shape is None:
        labels.pin_node(node, f"the shape at Split '{name}' is not known")
        return
    axis = int_attribute(node, "axis", 0) % len(shape)
    if axis != track.axis:
        for value in node.outputs:
            labels.follow(value, track)
        return
    sizes = input_or_attribute(node, 1, "split")
    given = sizes is not None
    if sizes is None:
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            labels.pin_node(node, f"Split '{name}' computes its sizes")
            return
        each = -(-shape[axis] // len(node.outputs))
        sizes = [min(each, shape[axis] - i * each) for i in range(len(node.outputs))]
    runs = np.split(track.ids, np.cumsum(sizes)[:-1])
    if not given:
        # Equal parts stop being equal once channels go, so the sizes are written down.
        if labels.opset() >= 13:
            fresh = add_initializer(labels.graph, f"{name}_sizes", np.array(sizes, np.int64))
            node.resize_inputs(2)
            node.replace_input_with(1, fresh)
            node.attributes.pop("num_outputs", None)
        else:
            node.attributes["split"] = ir.AttrInt64s("split", sizes)
    for at, (value, run) in enumerate(zip(node.outputs, runs, strict=True)):
        if "split" in node.attributes:
            labels.count_attribute(node, "split", at, run)
        elif not labels.count_input(node, 1, at, run):
            labels.pin(run, f"Split '{name}' computes its sizes")
        labels.follow(value, Track(axis, run))


def slice_(labels: Labels, node: ir.Node) -> None:
    """Slice: along the channel axis a run of labels; where it starts and ends are counts."""
    track = labels.track(node.inputs[0])
    if track is None:
        return
    shape = labels.shape(node.inputs[0])
    starts, ends = (input_or_attribute(node, at, name) for at, name in ((1, "starts"), (2, "ends")))
    name = node.outputs[0].name
    computed = any(len(node.inputs) > at and node.inputs[at] and constant(node.inputs[at]) is None for at in (3, 4))
    if shape is None or starts is None or ends is None or computed:
        labels.pin_node(node, f"Slice '{name}' computes its bounds")
        return
    axes = input_or_attribute(node, 3, "axes") or list(range(len(starts)))
    steps = input_or_attribute(node, 4, "steps") or [1] * len(starts)
    axes = [axis % len(shape) for axis in axes]
    if track.axis not in axes:
        labels.follow(node.outputs[0], track)
        return
    at = axes.index(track.axis)
    size = shape[track.axis]
    start, end = (min(max(b + size if b < 0 else b, 0), size) for b in (starts[at], ends[at]))
    ids = track.ids[start:end]
    if steps[at] != 1 or end <= start:
        labels.pin_node(node, f"Slice '{name}' takes channels in steps")
        return
    for position, attribute, bound in ((1, "starts", start), (2, "ends", end)):
        if bound in (0, size) and (starts, ends)[position - 1][at] >= bound:
            continue  # the very first channel, or past the last: true whatever goes
        if attribute in node.attributes:
            labels.count_attribute(node, attribute, at, track.ids[:bound])
        elif not labels.count_input(node, position, at, track.ids[:bound]):
            labels.pin(track.ids, f"Slice '{name}' computes its bounds")
    labels.follow(node.outputs[0], Track(track.axis, ids))


def pad(labels: Labels, node: ir.Node) -> None:
    """Pad: along the channel axis new labels for the padded channels; how many is a count."""
    track = labels.track(node.inputs[0])
    if track is None:
        return
    shape = labels.shape(node.inputs[0])
    name = node.outputs[0].name
    pads = input_or_attribute(node, 1, "pads" if "pads" in node.attributes else "paddings")
    if shape is None or pads is None:
        labels.pin_node(node, f"Pad '{name}' computes its sizes")
        return
    axes = list(range(len(shape)))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        array = constant(node.inputs[3])
        if array is None:
            labels.pin_node(node, f"Pad '{name}' computes its axes")
            return
        axes = [int(a) % len(shape) for a in array]
    if track.axis not in axes:
        labels.follow(node.outputs[0], track)
        return
    at = axes.index(track.axis)
    before, after = pads[at], pads[at + len(axes)]
    if before == after == 0:
        labels.follow(node.outputs[0], track)
        return
    if min(before, after) < 0 or text_attribute(node, "mode", "constant") != "constant":
        labels.pin_node(node, f"Pad '{name}' crops or repeats channels")
        return
    ids = [track.ids]
    for count, index, side in ((before, at, 0), (after, at + len(axes), 1)):
        if not count:
            continue
        padded = labels.fresh(count)
        ids.insert(len(ids) if side else 0, padded)
        if "pads" in node.attributes:
            labels.count_attribute(node, "pads", index, padded)
        elif not labels.count_input(node, 1, index, padded):
            labels.pin(padded, f"Pad '{name}' computes its sizes")
    labels.follow(node.outputs[0], Track(track.axis, np.concatenate(ids)))


def resize(labels: Labels, node: ir.Node) -> None:
    """Resize, Upsample: channels stay; a target size that states their number is a count."""
    track = labels.track(node.inputs[0])
    if track is None:
        return
    before, after = labels.shape(node.inputs[0]), labels.shape(node.outputs[0])
    name = node.outputs[0].name
    if before is None or after is None or before[track.axis] != after[track.axis]:
        labels.pin_node(node, f"the shape at {node.op_type} '{name}' is not known, or it resizes channels")
        return
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        axes = list_attribute(node, "axes") or list(range(len(before)))
        axes = [axis % len(before) for axis in axes]
        if track.axis in axes and not labels.count_input(node, 3, axes.index(track.axis), track.ids):
            labels.pin(track.ids, f"Resize '{name}' computes its sizes")
    labels.follow(node.outputs[0], track)


def expand(labels: Labels, node: ir.Node) -> None:
    """Expand: the channel entry of the target is a count, unless it is 1."""
    track = labels.track(node.inputs[0])
    if track is None:
        return
    before, after = labels.shape(node.inputs[0]), labels.shape(node.outputs[0])
    name = node.outputs[0].name
    if before is None or after is None:
        labels.pin_node(node, f"the shape at Expand '{name}' is not known")
        return
    axis = track.axis + len(after) - len(before)
    if before[track.axis] != after[axis]:
        labels.pin_node(node, f"Expand '{name}' spreads one channel over many")
        return
    target = constant(node.inputs[1])
    at = axis - (len(after) - len(target)) if target is not None else axis
    stated = target is None or (at >= 0 and int(target[at]) != 1)
    if stated and not labels.count_input(node, 1, at, track.ids, inferred=(-1,)):
        labels.pin(track.ids, f"Expand '{name}' computes its shape")
    labels.follow(node.outputs[0], Track(axis, track.ids))


def tile(labels: Labels, node: ir.Node) -> None:
    """Tile: labels are repeated."""
    track = labels.track(node.inputs[0])
    if track is None:
        return
    repeats = constant(node.inputs[1])
    if repeats is None or repeats.ndim != 1:
        labels.pin_node(node, f"Tile '{node.outputs[0].name}' computes its repeats")
        return
    labels.follow(node.outputs[0], Track(track.axis, np.tile(track.ids, int(repeats[track.axis]))))


def gather(labels: Labels, node: ir.Node) -> None:
    """Gather: channels pass when another axis is indexed."""
    track = labels.track(node.inputs[0])
    shape, indices = labels.shape(node.inputs[0]), labels.shape(node.inputs[1])
    labels.pin_value(node.inputs[1], "it is used as an index")
    if track is None:
        return
    name = node.outputs[0].name
    if shape is None or indices is None:
        labels.pin_node(node, f"the shape at Gather '{name}' is not known")
        return
    axis = int_attribute(node, "axis", 0) % len(shape)
    if axis == track.axis:
        labels.pin(track.ids, f"Gather '{name}' picks channels by number")
        return
    moved = track.axis + (len(indices) - 1 if track.axis > axis else 0)
    labels.follow(node.outputs[0], Track(moved, track.ids))


def depth_to_space(labels: Labels, node: ir.Node) -> None:
    """DepthToSpace: the channels that become one output channel's pixels are tied."""
    track = labels.track(node.inputs[0])
    if track is None:
        return
    block = int_attribute(node, "blocksize", 1) ** 2
    if track.axis != 1 or len(track.ids) % block:
        labels.pin_node(node, f"DepthToSpace '{node.outputs[0].name}' does not move whole channels")
        return
    columns_first = text_attribute(node, "mode", "DCR") == "CRD"
    grid = track.ids.reshape(-1, block) if columns_first else track.ids.reshape(block, -1).T
    for column in range(1, block):
        labels.tie(grid[:, 0], grid[:, column])
    labels.follow(node.outputs[0], Track(1, grid[:, 0].copy()))


def space_to_depth(labels: Labels, node: ir.Node) -> None:
    """SpaceToDepth: every channel becomes a run of `blocksize` squared ones, block by block."""
    track = labels.track(node.inputs[0])
    if track is None:
        return
    if track.axis != 1:
        labels.pin_node(node, f"SpaceToDepth '{node.outputs[0].name}' does not move whole channels")
        return
    block = int_attribute(node, "blocksize", 1) ** 2
    labels.follow(node.outputs[0], Track(1, np.tile(track.ids, block)))


RESHAPING = {
    "Reshape": reshape,
    "Flatten": flatten,
    "Squeeze": flatten,
    "Unsqueeze": flatten,
    "Transpose": transpose,
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "Pad": pad,
    "Resize": resize,
    "Upsample": resize,
    "Expand": expand,
    "Tile": tile,
    "Gather": gather,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
}
