"""Random graphs of supported operators: whatever may go can go, and masked equals cut."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from helpers import same_answers, same_interface
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from xdonnx.errors import ModelError
from xdonnx.graph import read_net
from xdonnx.patch import Patch, cut, masked

SIZE = 8


@dataclass
class Graph:
    """A graph under construction: every value's channels and size are known."""

    random: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    values: list[tuple[str, int, int]] = field(default_factory=list)  # name, channels, height = width

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        fan_in = max(int(np.prod(shape[1:])), 1)
        array = self.random.standard_normal(shape) / np.sqrt(fan_in)
        self.weights.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def integers(self, numbers: list[int]) -> str:
        name = f"i{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
        return name

    def node(self, op: str, inputs: list[str], channels: int, size: int, outputs: int = 1, **attributes: object) -> str:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, **attributes))
        self.values.append((names[0], channels, size))
        return names[0]


def conv(g: Graph, draw: st.DrawFn, x: tuple[str, int, int]) -> None:
    name, channels, size = x
    out = draw(st.sampled_from([2, 4, 6, 8]))
    groups = 2 if channels % 2 == 0 and out % 2 == 0 and draw(st.booleans()) else 1
    kernel = draw(st.sampled_from([1, 3]))
    inputs = [name, g.weight(out, channels // groups, kernel, kernel)]
    if draw(st.booleans()):
        inputs.append(g.weight(out))
    g.node("Conv", inputs, out, size, group=groups, pads=[kernel // 2] * 4)


def depthwise(g: Graph, draw: st.DrawFn, x: tuple[str, int, int]) -> None:
    name, channels, size = x
    times = draw(st.sampled_from([1, 2]))
    inputs = [name, g.weight(channels * times, 1, 3, 3), g.weight(channels * times)]
    g.node("Conv", inputs, channels * times, size, group=channels, pads=[1] * 4)


def transposed(g: Graph, draw: st.DrawFn, x: tuple[str, int, int]) -> None:
    name, channels, size = x
    if size > SIZE:
        return
    out = draw(st.sampled_from([2, 4, 6]))
    groups = 2 if channels % 2 == 0 and draw(st.booleans()) else 1
    g.node(
        "ConvTranspose", [name, g.weight(channels, out // groups, 2, 2)], out, size * 2, strides=[2, 2], group=groups
    )


def activation(g: Graph, draw: st.DrawFn, x: tuple[str, int, int]) -> None:
    name, channels, size = x
    op = draw(st.sampled_from(["Relu", "Sigmoid", "Tanh", "HardSwish", "PRelu", "Mul", "Softmax"]))
    if op == "PRelu":
        g.node(op, [name, g.weight(channels, 1, 1)], channels, size)
    elif op == "Mul":
        g.node(op, [g.weight(1, channels, 1, 1), name], channels, size)
    elif op == "Softmax":
        g.node(op, [name], channels, size, axis=draw(st.sampled_from([1, 2, 3])))
    else:
        g.node(op, [name], channels, size)


def pool(g: Graph, draw: st.DrawFn, x: tuple[str, int, int]) -> None:
    name, channels, size = x
    if size < 4:
        return
    op = draw(st.sampled_from(["MaxPool", "AveragePool"]))
    g.node(op, [name], channels, size // 2, kernel_shape=[2, 2], strides=[2, 2])


def combine(g: Graph, draw: st.DrawFn, x: tuple[str, int, int]) -> None:
    name, channels, size = x
    same = [v for v in g.values if v[2] == size]
    other = draw(st.sampled_from(same))
    alike = [v for v in same if v[1] == channels]
    if draw(st.booleans()):
        partner = draw(st.sampled_from(alike))
        g.node(draw(st.sampled_from(["Add", "Mul", "Max"])), [name, partner[0]], channels, size)
    else:
        g.node("Concat", [name, other[0]], channels + other[1], size, axis=1)


def gate(g: Graph, draw: st.DrawFn, x: tuple[str, int, int]) -> None:
    name, channels, size = x
    pooled = g.node("GlobalAveragePool", [name], channels, 1)
    squeezed = g.node("Conv", [pooled, g.weight(4, channels, 1, 1)], 4, 1)
    expanded = g.node("Conv", [squeezed, g.weight(channels, 4, 1, 1)], channels, 1)
    opened = g.node("Sigmoid", [expanded], channels, 1)
    g.node("Mul", [name, opened], channels, size)


def part(g: Graph, draw: st.DrawFn, x: tuple[str, int, int]) -> None:
    name, channels, size = x
    if channels < 2:
        return
    kind = draw(st.sampled_from(["Split", "Slice", "Pad"]))
    at = draw(st.integers(1, channels - 1))
    if kind == "Split":
        left = g.node("Split", [name, g.integers([at, channels - at])], at, size, outputs=2, axis=1)
        g.values.append((left.replace("_0", "_1"), channels - at, size))
    elif kind == "Slice":
        bounds = [g.integers([-at]), g.integers([2**31]), g.integers([1])]
        g.node("Slice", [name, *bounds], at, size)
    else:
        g.node("Pad", [name, g.integers([0, 1, 0, 0, 0, at, 0, 0])], channels + 1 + at, size)


def shuffle(g: Graph, draw: st.DrawFn, x: tuple[str, int, int]) -> None:
    name, channels, size = x
    if channels % 2:
        return
    apart = g.node("Reshape", [name, g.integers([0, 2, channels // 2, size, size])], channels, size)
    turned = g.node("Transpose", [apart], channels, size, perm=[0, 2, 1, 3, 4])
    g.values = [v for v in g.values if v[0] not in (apart, turned)]
    g.node("Reshape", [turned, g.integers([0, channels, size, size])], channels, size)


def rearrange(g: Graph, draw: st.DrawFn, x: tuple[str, int, int]) -> None:
    name, channels, size = x
    if channels % 4 or size > SIZE:
        return
    mode = draw(st.sampled_from(["DCR", "CRD"]))
    g.node("DepthToSpace", [name], channels // 4, size * 2, blocksize=2, mode=mode)


STEPS = [
    conv,
    conv,
    depthwise,
    transposed,
    activation,
    activation,
    pool,
    combine,
    combine,
    gate,
    part,
    shuffle,
    rearrange,
]


@st.composite
def graphs(draw: st.DrawFn) -> onnx.ModelProto:
    g = Graph(np.random.default_rng(draw(st.integers(0, 2**31))))
    g.values.append(("image", 3, SIZE))
    conv(g, draw, g.values[0])
    for _ in range(draw(st.integers(1, 9))):
        recent = g.values[max(0, len(g.values) - 3) :]
        draw(st.sampled_from(STEPS))(g, draw, draw(st.sampled_from(recent)))
    name, channels, size = g.values[-1]
    if draw(st.booleans()):
        g.node("Conv", [name, g.weight(3, channels, 1, 1)], 3, size)
    else:
        flat = g.node("Flatten", [name], channels * size * size, 1)
        g.node("Gemm", [flat, g.weight(5, channels * size * size)], 5, 1, transB=1)
    out, rank = g.values[-1][0], 4 if g.nodes[-1].op_type == "Conv" else 2
    graph = helper.make_graph(
        g.nodes,
        "random",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, [None] * rank)],
        g.weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(graphs(), st.integers(0, 2**31))
def test_masked_equals_cut_on_random_graphs(model: onnx.ModelProto, seed: int) -> None:
    try:
        net = read_net(model)
    except ModelError as error:
        assume("no convolution" not in str(error))  # the drawn output goes past all of them
        raise
    random = np.random.default_rng(seed)
    drop: set[int] = set()
    for group in net.groups:
        count = int(random.integers(0, len(group.ids)))
        drop |= {int(label) for label in random.choice(group.ids, count, replace=False)}
    patch = Patch({}, frozenset(drop))
    inputs = {"image": random.standard_normal((2, 3, SIZE, SIZE)).astype(np.float32)}

    silenced, student = masked(net, patch), cut(net, patch)

    onnx.checker.check_model(student, full_check=True)
    same_answers(silenced, student, inputs)
    same_interface(model, student)
