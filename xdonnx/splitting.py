"""Put the pieces of layers into the graph: the last has the layer's place, name and bias, the others stand before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from xdonnx.graph import Net
from xdonnx.labels import text_attribute
from xdonnx.layers import Layer
from xdonnx.lowrank import Array, channel_pieces, composed, pair_pieces
from xdonnx.prepare import add_initializer, free_name, set_array
from xdonnx.ranks import Split, first_spans, weight_of


@dataclass(frozen=True)
class Piece:
    """One of the layers that a layer is taken apart into.

    Parameters
    ----------
    array : (groups, outputs, inputs, kernel...)
    spans : tuple of bool
        Which axes of the kernel are its own, with their strides, dilations and pads.
    tag : str
        What its new names end in; the last piece keeps the old ones.
    """

    array: Array
    spans: tuple[bool, ...]
    tag: str


Parts = Mapping[str, tuple[Piece, ...]]


def pieces_of(net: Net, layer: Layer, split: Split) -> tuple[Piece, ...]:
    """Return the pieces of a layer, in the order in which they run."""
    weight = weight_of(net, layer)
    if split.scheme == "channel":
        found = []
        for array in channel_pieces(weight, *split.ranks):
            core = array.shape[3:] == layer.kernel
            found.append(Piece(array, (core,) * len(layer.kernel), "core" if core else "reduced"))
        return tuple(found)
    first, last = pair_pieces(weight, *split.ranks)
    spans = first_spans(layer.kernel)
    tag = "reduced" if split.scheme == "svd" else "column"
    return Piece(first, spans, tag), Piece(last, tuple(not own for own in spans), "")


def taken_apart(net: Net, parts: Parts) -> onnx.ModelProto:
    """Return the net with the pieces of layers in their place.

    The last piece keeps the names of node, value and weight; new names are derived from these. Everything else stays,
    the interface above all.
    """
    model = net.model.clone()
    for node in list(model.graph):
        name = str(node.outputs[0].name)
        if name in parts:
            _replace(model.graph, node, net.layers[name], parts[name])
    return ir.to_proto(model)


def rebuilt(net: Net, parts: Parts) -> onnx.ModelProto:
    """Return the net with whole layers of the weights that their pieces come to: it answers as `taken_apart` does."""
    model = net.model.clone()
    for name, pieces in parts.items():
        layer = net.layers[name]
        weight = composed([piece.array for piece in pieces])
        set_array(model.graph.initializers[layer.weight], _stored(weight, layer))
    return ir.to_proto(model)


def _replace(graph: ir.Graph, node: ir.Node, layer: Layer, pieces: tuple[Piece, ...]) -> None:
    value, held = node.inputs[0], node.inputs[1]
    assert value is not None and held is not None and held.const_value is not None
    dtype = held.const_value.numpy().dtype
    for piece in pieces[:-1]:
        # A product before opset 11 has to have a bias; MatMul has none, and wants inputs before outputs.
        stored = _stored(piece.array, layer) if layer.kernel else piece.array[0].T
        weight = add_initializer(graph, f"{layer.weight}.{piece.tag}", stored.astype(dtype))
        made = ir.Node(
            "",
            "Conv" if layer.kernel else "MatMul",
            [value, weight],
            _window(node, layer, piece),
            name=f"{node.name}.{piece.tag}" if node.name else None,
        )
        made.outputs[0].name = free_name(graph, f"{layer.name}.{piece.tag}")
        made.outputs[0].type = node.outputs[0].type
        graph.insert_before(node, made)
        value = made.outputs[0]
    node.replace_input_with(0, value)
    set_array(held, _stored(pieces[-1].array, layer))
    window = _window(node, layer, pieces[-1])
    node.attributes.pop("auto_pad", None)
    for attribute in window:
        node.attributes[attribute.name] = attribute


def _stored(weight: np.ndarray, layer: Layer) -> np.ndarray:
    """Return a weight as the file holds it."""
    if not layer.kernel:
        matrix: np.ndarray = weight[0]
        return matrix.T if layer.transposed else matrix
    return weight.reshape(-1, *weight.shape[2:])


def _window(node: ir.Node, layer: Layer, piece: Piece) -> list[ir.Attr]:
    """Return the attributes of a piece: those of the layer along the axes that it spans."""
    if not layer.kernel:
        return []

    def own(values: tuple[int, ...], otherwise: int) -> list[int]:
        return [value if mine else otherwise for value, mine in zip(values, piece.spans, strict=True)]

    half = len(layer.kernel)
    found = [
        ir.AttrInt64("group", layer.groups),
        ir.AttrInt64s("kernel_shape", list(piece.array.shape[3:])),
        ir.AttrInt64s("strides", own(layer.strides, 1)),
        ir.AttrInt64s("dilations", own(layer.dilations, 1)),
    ]
    mode = text_attribute(node, "auto_pad", "NOTSET")
    if mode.startswith("SAME"):
        # Where sizes are free, so are these pads: they are left to the operator, and are none where the kernel is 1.
        return [*found, ir.AttrString("auto_pad", mode)]
    pads = own(layer.pads[:half], 0) + own(layer.pads[half:], 0)
    return [*found, ir.AttrInt64s("pads", pads)]
