"""How the layers of a graph feed each other, and which of them stand in a row: names are looked at nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from xdonnx.graph import Net
from xdonnx.layers import Layer

# Nodes that change no value, or whose presence depends on the exporter.
_SILENT = frozenset({"Identity", "Dropout", "Cast"})
# What may stand between two layers that took the place of one: all of them act on single elements.
_POINTWISE = frozenset(
    {
        "Relu",
        "Clip",
        "LeakyRelu",
        "PRelu",
        "Elu",
        "Selu",
        "HardSwish",
        "Sigmoid",
        "Mul",
        "Add",
        "Div",
        "BatchNormalization",
    }
)
# The longest row that one layer is replaced by: the four factors of a CP decomposition.
LONGEST = 4


@dataclass(frozen=True)
class Wire:
    """Where a value comes from.

    Parameters
    ----------
    sources : frozenset of str
        Layers whose outputs reach it with no layer between, and graph inputs, these as '#0', '#1' by their place.
    operators : frozenset of str
        Operators on the way.
    """

    sources: frozenset[str]
    operators: frozenset[str]


@dataclass(frozen=True)
class Wiring:
    """The layers of a net and what lies between them.

    Parameters
    ----------
    inputs : {layer: Wire}
        Of the value that the layer reads.
    readers : {layer: frozenset of str}
        Layers that its output reaches with no layer between; '#out' for a graph output.
    after : {layer: frozenset of str}
        Operators that read its output directly.
    """

    inputs: Mapping[str, Wire]
    readers: Mapping[str, frozenset[str]]
    after: Mapping[str, frozenset[str]]


def wired(net: Net) -> Wiring:
    """Return the wiring of a net, in one pass over its graph."""
    wires = {str(v.name): Wire(frozenset({f"#{at}"}), frozenset()) for at, v in enumerate(net.model.graph.inputs)}
    inputs: dict[str, Wire] = {}
    readers: dict[str, set[str]] = {name: set() for name in net.layers}
    nothing = Wire(frozenset(), frozenset())
    for node in net.model.graph:
        read = [wires.get(str(value.name), nothing) for value in node.inputs if value is not None]
        name = str(node.outputs[0].name)
        if name in net.layers:
            inputs[name] = wires.get(net.layers[name].input, nothing)
            for source in inputs[name].sources & set(readers):
                readers[source].add(name)
            made = Wire(frozenset({name}), frozenset())
        else:
            operators = frozenset() if node.op_type in _SILENT else frozenset({node.op_type})
            sources = frozenset[str]().union(*(wire.sources for wire in read))
            made = Wire(sources, operators.union(*(wire.operators for wire in read)))
        for value in node.outputs:
            wires[str(value.name)] = made
    for value in net.model.graph.outputs:
        for source in wires.get(str(value.name), nothing).sources & set(readers):
            readers[source].add("#out")
    after = {str(n.outputs[0].name): _after(n.outputs[0]) for n in net.model.graph if n.outputs[0].name in net.layers}
    return Wiring(inputs, {name: frozenset(found) for name, found in readers.items()}, after)


def _after(value: ir.Value) -> frozenset[str]:
    """Return the operators that read a value, those that change nothing passed over; '#out' is who reads answers."""
    found: set[str] = {"#out"} if value.is_graph_output() else set()
    for node, _ in value.uses():
        if node.op_type in _SILENT:
            found.update(*(_after(made) for made in node.outputs))
        else:
            found.add(node.op_type)
    return frozenset(found)


def before_relu(net: Net) -> dict[str, bool]:
    """Return the layers whose output nothing but a ReLU reads, and whether something is added to it before that."""
    found: dict[str, bool] = {}
    for node in net.model.graph:
        value = node.outputs[0]
        if value.name not in net.layers:
            continue
        if (after := _after(value)) == {"Relu"}:
            found[str(value.name)] = False
        elif after == {"Add"} and len(value.uses()) == 1:
            (adder, _), *_ = value.uses()
            if adder.op_type == "Add" and _after(adder.outputs[0]) == {"Relu"}:
                found[str(value.name)] = True
    return found


def rows(net: Net, wiring: Wiring, last: str) -> list[tuple[str, ...]]:
    """Return the rows of layers that end in `last` and may stand for one layer, the shortest first.

    In a row each layer reads the one before it alone, is read by the one after it alone, and nothing but operators on
    single elements lies between.
    """
    found: list[tuple[str, ...]] = [(last,)]
    while len(found[-1]) < LONGEST:
        first = found[-1][0]
        wire = wiring.inputs[first]
        if len(wire.sources) != 1 or not wire.operators <= _POINTWISE:
            break
        before = next(iter(wire.sources))
        if before not in net.layers or wiring.readers[before] != {first}:
            break
        if kind(net.layers[before]) != kind(net.layers[first]):
            break
        found.append((before, *found[-1]))
    return found


def linear(wiring: Wiring, row: tuple[str, ...]) -> bool:
    """Whether nothing lies between the layers of a row, so that they come to one linear layer."""
    return all(not wiring.inputs[name].operators for name in row[1:])


def kind(layer: Layer) -> str:
    """Return 'conv', 'conv_transpose' or 'product': layers of different kinds never stand for each other."""
    return {"Conv": "conv", "ConvTranspose": "conv_transpose"}.get(layer.op, "product")
