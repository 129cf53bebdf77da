"""The central promise: removing channels changes nothing that silencing them had not changed already."""

from __future__ import annotations

import nets
import numpy as np
import onnx
import pytest
from helpers import same_answers, same_interface
from onnx import numpy_helper

from xdonnx.graph import Net, read_net
from xdonnx.model import interface
from xdonnx.patch import Patch, cut, masked


def some_dropped(net: Net, seed: int) -> Patch:
    """Drop a random share of every group, at least one channel of it."""
    random = np.random.default_rng(seed)
    drop: set[int] = set()
    for group in net.groups:
        count = int(random.integers(1, len(group.ids)))
        drop |= {int(label) for label in random.choice(group.ids, count, replace=False)}
    return Patch({}, frozenset(drop))


@pytest.mark.parametrize("opset", [11, 13, 17, 21])
@pytest.mark.parametrize("name", nets.ALL)
def test_masked_and_cut_students_answer_alike(name: str, opset: int) -> None:
    if name == "split" and opset < 13:
        pytest.skip("Split took its sizes as an attribute then")
    teacher = nets.build(name, opset=opset)
    net = read_net(teacher)
    assert net.groups, "the net was built to have channels that may go"
    patch = some_dropped(net, seed=opset)

    silenced, student = masked(net, patch), cut(net, patch)

    onnx.checker.check_model(student, full_check=True)
    for rows in (1, 5):
        same_answers(silenced, student, nets.samples(teacher, rows))
    same_interface(teacher, student)
    weights = [sum(numpy_helper.to_array(t).size for t in m.graph.initializer) for m in (silenced, student)]
    assert weights[1] < weights[0]


@pytest.mark.parametrize("name", nets.ALL)
def test_an_empty_patch_changes_no_answer(name: str) -> None:
    teacher = nets.build(name)
    net = read_net(teacher)
    same_answers(teacher, cut(net, Patch()), nets.samples(teacher))


def test_silencing_changes_the_answer() -> None:
    teacher = nets.build("plain")
    net = read_net(teacher)
    with pytest.raises(AssertionError, match="differs by"):
        same_answers(teacher, masked(net, some_dropped(net, 0)), nets.samples(teacher))


def test_cut_keeps_the_dynamic_batch_axis_metadata_and_opset() -> None:
    teacher = nets.build("residual", opset=17)
    net = read_net(teacher)
    student = cut(net, some_dropped(net, 0))
    port = interface(student).inputs[0]
    assert (port.name, port.dtype, port.shape) == ("image", "float32", ("N", 3, 8, 8))
    assert interface(student).metadata == {"author": "someone"}
    assert interface(student).opset == {"": 17}
    assert student.producer_name == "test"


def test_cut_keeps_the_names_of_layers() -> None:
    teacher = nets.build("batchnorm")
    net = read_net(teacher)
    # n1 is what the rest of the graph, and the user, saw of c1 and its normalization.
    assert list(net.layers) == ["n1", "out"]
    made = {name for node in cut(net, some_dropped(net, 0)).graph.node for name in node.output}
    assert {"n1", "r1", "out"} <= made


def test_weights_in_constant_nodes_and_shared_biases_are_cut_too() -> None:
    text = """
g (float[N,3,8,8] image, float[8,3,3,3] w1, float[8] b, float[8,8,3,3] w2, float[4,8,1,1] w3) => (float[N,4,8,8] out) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b)
  r1 = Relu (c1)
  c2 = Conv <pads = [1,1,1,1]> (r1, w2, b)
  scale = Constant <value = float[8,1,1] {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}> ()
  m = Mul (c2, scale)
  out = Conv (m, w3)
}"""
    teacher = nets.from_text(text)
    net = read_net(teacher)
    # Equal biases are one initializer in the file, and still two parameters.
    assert [group.name for group in net.groups] == ["c1", "c2"]
    patch = Patch({}, frozenset(int(i) for i in net.groups[1].ids[2:5]))
    student = cut(net, patch)
    same_answers(masked(net, patch), student, nets.samples(teacher))
    shapes = {t.name: tuple(t.dims) for t in student.graph.initializer}
    assert shapes["scale"] == (5, 1, 1)
    assert shapes["w1"] == (8, 3, 3, 3)
