"""Layers in pieces answer as the whole layers that the pieces come to, with strides, pads, names and types in place."""

from __future__ import annotations

from collections.abc import Callable

import nets
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import same_answers, same_interface
from onnx import numpy_helper

from xdonnx.cost import measure_cost
from xdonnx.errors import NothingToDo
from xdonnx.graph import Net, read_net
from xdonnx.lowrank import channel_pieces, composed, pair_ranks
from xdonnx.ranks import LowRank, Split, choose, weight_of
from xdonnx.splitting import pieces_of, rebuilt, taken_apart

# One layer each, with what could go to the wrong piece; `w` is 5 by 4 channels.
LAYERS = {
    "strides": "float[N,4,9,8] x, float[5,4,3,3] w, float[5] b => Conv <strides = [2,3], pads = [1,1,1,1]> (x, w, b)",
    "pads": "float[N,4,9,8] x, float[5,4,3,2] w, float[5] b => Conv <pads = [0,1,2,0]> (x, w, b)",
    "dilations": "float[N,4,9,8] x, float[5,4,3,3] w => Conv <dilations = [2,1], pads = [2,0,2,0]> (x, w)",
    "no bias": "float[N,4,9,8] x, float[5,4,3,3] w => Conv <kernel_shape = [3,3]> (x, w)",
    "groups": "float[N,8,9,8] x, float[10,4,3,3] w, float[10] b => Conv <group = 2, strides = [2,1]> (x, w, b)",
    "1x1": "float[N,4,9,8] x, float[5,4,1,1] w, float[5] b => Conv <strides = [2,2], pads = [1,0,0,1]> (x, w, b)",
    "row": "float[N,4,9,8] x, float[5,4,1,3] w => Conv <strides = [2,2], pads = [1,1,1,1]> (x, w)",
    "same": "float[N,4,9,8] x, float[5,4,3,2] w => Conv <auto_pad = \"SAME_LOWER\", strides = [2,2]> (x, w)",
    "valid": "float[N,4,9,8] x, float[5,4,3,2] w => Conv <auto_pad = \"VALID\", strides = [2,1]> (x, w)",
    "signal": "float[N,4,9] x, float[5,4,3] w => Conv <strides = [2], pads = [2,0], dilations = [2]> (x, w)",
    "volume": "float[N,4,5,6,7] x, float[5,4,3,2,3] w => Conv <strides = [1,2,1], pads = [0,1,0,1,0,1]> (x, w)",
}  # fmt: skip
WINDOWS = [name for name in LAYERS if name != "1x1"]


def net_of(name: str, *, weight: Callable[[np.ndarray], np.ndarray] = lambda array: array) -> Net:
    inputs, _, call = LAYERS[name].partition(" => ")
    rank = inputs.partition("]")[0].count(",") + 1
    sizes = ", ".join(["N", "c", "d", "e", "f"][:rank])
    proto = nets.from_text(f"g ({inputs}) => (float[{sizes}] out) {{ out = {call} }}", images=("x",))
    held = next(tensor for tensor in proto.graph.initializer if tensor.name == "w")
    held.CopyFrom(numpy_helper.from_array(weight(numpy_helper.to_array(held)).astype(np.float32), "w"))
    return read_net(proto)


def apart(net: Net, split: Split) -> onnx.ModelProto:
    return taken_apart(net, {"out": pieces_of(net, net.layers["out"], split)})


@pytest.mark.parametrize("name", LAYERS)
def test_a_pair_of_full_rank_answers_as_the_layer_does(name: str) -> None:
    net = net_of(name)
    full = pair_ranks(weight_of(net, net.layers["out"]).shape)

    student = apart(net, Split("spatial", (full,), 0, 0, 1.0))

    onnx.checker.check_model(student, full_check=True)
    assert [node.op_type for node in student.graph.node] == ["Conv", "Conv"]
    same_interface(net.source, student)
    same_answers(net.source, student, nets.samples(net.source), tolerance=1e-4)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_core_of_the_rank_that_the_weight_has_answers_as_the_layer_does(name: str) -> None:
    def of_rank_two(array: np.ndarray) -> np.ndarray:
        grouped = array.reshape(2 if name == "groups" else 1, -1, *array.shape[1:])
        return composed(channel_pieces(grouped, 2, 2)).reshape(array.shape)

    net = net_of(name, weight=of_rank_two)

    student = apart(net, Split("channel", (2, 2), 0, 0, 1.0))

    onnx.checker.check_model(student, full_check=True)
    assert [node.op_type for node in student.graph.node] == ["Conv"] * 3
    same_answers(net.source, student, nets.samples(net.source), tolerance=1e-4)


@pytest.mark.parametrize("split", [Split("spatial", (12,), 0, 0, 1.0), Split("channel", (4, 4), 0, 0, 1.0)])
def test_pads_that_follow_a_free_size_still_do(split: Split) -> None:
    text = 'g (float[N,4,H,W] x, float[5,4,3,3] w) => (float[N,5,h,k] out) { out = Conv <auto_pad = "SAME_UPPER", '
    text += "strides = [2,2]> (x, w) }"
    proto = nets.from_text(text, images=("x",))
    net = read_net(proto, {"x": (1, 4, 9, 9)})

    parts = {"out": pieces_of(net, net.layers["out"], split)}

    for size in ((9, 9), (8, 8), (6, 11)):
        image = np.random.default_rng(0).standard_normal((2, 4, *size)).astype(np.float32)
        same_answers(rebuilt(net, parts), taken_apart(net, parts), {"x": image})


@pytest.mark.parametrize("scheme", ["auto", "spatial", "channel"])
@pytest.mark.parametrize("name", nets.ALL)
def test_every_net_in_pieces_answers_as_with_whole_layers_and_costs_what_was_said(name: str, scheme: str) -> None:
    net = read_net(nets.build(name))
    choice = choose(net, LowRank("energy", 0.5, scheme, include=("*",), round_to=1))
    parts = {layer: pieces_of(net, net.layers[layer], split) for layer, split in choice.splits.items()}

    student = taken_apart(net, parts)

    onnx.checker.check_model(student, full_check=True)
    same_interface(net.source, student)
    same_answers(rebuilt(net, parts), student, nets.samples(net.source), tolerance=1e-4)
    whole, found = measure_cost(ir.to_proto(net.model)), measure_cost(student)
    for layer, split in choice.splits.items():
        assert split.macs < net.layers[layer].macs
    assert whole.macs - found.macs == sum(net.layers[n].macs - s.macs for n, s in choice.splits.items())
    saved = sum(weight_of(net, net.layers[n]).size - s.params for n, s in choice.splits.items())
    assert whole.params - found.params == saved


@pytest.mark.parametrize("stored", ["Gemm <transB = 1> (f, w, b)", "Gemm (f, w, b)", "MatMul (f, w)"])
@pytest.mark.parametrize("opset", [9, 13])
def test_products_become_two_however_they_store_their_weight(stored: str, opset: int) -> None:
    shape = "7,6" if "transB" in stored else "6,7"
    text = f"""g (float[N,3,4,4] image, float[6,3,3,3] k, float[{shape}] w, float[7] b) => (float[N,7] out) {{
      c = Conv (image, k)
      p = GlobalAveragePool (c)
      f = Flatten (p)
      out = {stored}
    }}"""
    net = read_net(nets.from_text(text, opset=opset))

    student = apart(net, Split("svd", (6,), 0, 0, 1.0))

    assert [node.op_type for node in student.graph.node][-2:] == ["MatMul", stored.partition(" ")[0]]
    same_answers(net.source, student, nets.samples(net.source), tolerance=1e-4)


def test_new_names_are_derived_from_the_old_and_make_way_for_those_there_are() -> None:
    proto = nets.build("plain")
    first, relu, pool, last = proto.graph.node
    first.name = "stem"
    relu.output[0] = pool.input[0] = "c1.column"
    last.input[1] = "w1.column"
    next(tensor for tensor in proto.graph.initializer if tensor.name == "w2").name = "w1.column"
    net = read_net(proto)

    student = taken_apart(net, {"c1": pieces_of(net, net.layers["c1"], Split("spatial", (2,), 0, 0, 1.0))})

    column, rest = student.graph.node[:2]
    assert (column.name, rest.name) == ("stem.column", "stem")
    assert column.output[0] == rest.input[0] == "c1.column_1" and rest.output[0] == "c1"
    assert column.input[1] == "w1.column_1" and rest.input[1:] == ["w1", "b1"]
    onnx.checker.check_model(student, full_check=True)


def test_pieces_have_the_type_of_the_weight() -> None:
    proto = nets.build("plain")
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    net = read_net(proto)
    choice = choose(net, LowRank("rank", 2, include=("*",)))
    parts = {name: pieces_of(net, net.layers[name], split) for name, split in choice.splits.items()}

    student = taken_apart(net, parts)

    assert {tensor.data_type for tensor in student.graph.initializer} == {onnx.TensorProto.FLOAT16}
    feeds = {name: array.astype(np.float16) for name, array in nets.samples(net.source).items()}
    same_answers(rebuilt(net, parts), student, feeds, tolerance=1e-2)


def test_a_net_of_which_nothing_gets_cheaper_is_refused() -> None:
    with pytest.raises(NothingToDo, match="rank 18 saves nothing"):
        choose(read_net(nets.build("plain")), LowRank("rank", 18, include=("out",)))
