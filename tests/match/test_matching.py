"""Which layer is which is known by construction; the search finds it without a name to go by."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import foreign
import nets
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from xdonnx.budget import Budget, make_plan
from xdonnx.errors import ModelError
from xdonnx.graph import Net, read_net
from xdonnx.likeness import whole_weight
from xdonnx.matching import ENOUGH, Given, Matching, Pair, check_alike, match, misfit, side
from xdonnx.methods.joint import producer_norms
from xdonnx.model import read_proto
from xdonnx.patch import Patch, cut, kept
from xdonnx.runtime import answer, open_session
from xdonnx.wiring import rows, wired

SAMPLES = Path(__file__).parents[2] / "samples"
DIGITS = ("vgg", "residual", "mobile")


@cache
def teacher(name: str) -> Net:
    return read_net(read_proto(SAMPLES / f"digits_{name}.onnx"))


@pytest.fixture(scope="module")
def images(digits: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    pixels = digits[0][:64].astype(np.float32) / 255
    return {"image": pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)}


def halved(net: Net) -> tuple[onnx.ModelProto, Patch]:
    """Return the student that keeps the larger half of every group's filters, sums included."""
    drop: list[int] = []
    for at, keep in make_plan(net, Budget("keep", 0.5, residual=True)).channels.items():
        order = np.argsort(-producer_norms(net, net.groups[at]), kind="stable")
        drop += [int(net.groups[at].ids[unit]) for unit in order[keep:]]
    patch = Patch({}, frozenset(drop))
    return cut(net, patch), patch


def found(net: Net, student: onnx.ModelProto, inputs: dict[str, np.ndarray], **given: Given) -> Matching:
    return match(side(net, inputs), side(read_net(student), inputs), given or None)


@pytest.mark.parametrize("name", DIGITS)
def test_layers_and_channels_of_a_cut_student_are_found_under_other_names(
    name: str, images: dict[str, np.ndarray]
) -> None:
    net = teacher(name)
    student, patch = halved(net)
    hidden, renamed = foreign.disguised(student)

    matching = found(net, hidden, images)

    assert {pair.teacher: pair.student for pair in matching.pairs} == {layer: (renamed[layer],) for layer in net.layers}
    assert not matching.absent and not matching.alone and matching.confidence > 0.999
    keep = kept(net, patch)
    for pair in matching.pairs:
        ids = net.layers[pair.teacher].out_ids
        assert pair.channels.tolist() == np.flatnonzero(keep[ids]).tolist(), pair.teacher
        assert pair.by == "weights"


@pytest.mark.parametrize("factor", [foreign.spatial, foreign.tucker, foreign.separable])
@pytest.mark.parametrize("name", DIGITS)
def test_rows_of_a_decomposed_student_are_found_under_other_names(
    name: str, factor: object, images: dict[str, np.ndarray]
) -> None:
    """Half of the ranks, or one kernel for each input channel: the worst that anybody would keep."""
    net = teacher(name)
    student, made = foreign.decomposed(net.source, factor, 0.5)  # type: ignore[arg-type]
    hidden, renamed = foreign.disguised(student, seed=1)
    # The file's BatchNormalization is folded on reading: a layer then has the name of what that made.
    folded = {node.input[0]: node.output[0] for node in student.graph.node if node.op_type == "BatchNormalization"}
    rows_of = {folded.get(old, old): [*row[:-1], folded.get(old, old)] for old, row in made.items()}

    matching = found(net, hidden, images)

    assert {pair.teacher: list(pair.student) for pair in matching.pairs} == {
        layer: [renamed[part] for part in rows_of.get(layer, [layer])] for layer in net.layers
    }
    assert made and not matching.alone and matching.confidence > ENOUGH


def test_a_student_whose_weights_were_trained_on_is_found_by_what_it_puts_out(images: dict[str, np.ndarray]) -> None:
    net = teacher("vgg")
    student, patch = halved(net)
    random = np.random.default_rng(0)
    for tensor in student.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim > 1:
            noise = random.standard_normal(array.shape) * array.std() * 0.2
            tensor.CopyFrom(numpy_helper.from_array((array + noise).astype(np.float32), tensor.name))

    matching = found(net, foreign.disguised(student)[0], images)

    keep = kept(net, patch)
    for pair in matching.pairs[:-2]:
        ids = net.layers[pair.teacher].out_ids
        assert pair.channels.tolist() == np.flatnonzero(keep[ids]).tolist(), pair.teacher
    assert ENOUGH < matching.confidence < 0.999


def test_channels_in_another_order_are_known_by_their_weights() -> None:
    model, net = nets.build("residual"), read_net(nets.build("residual"))
    inputs = nets.samples(model, 8)
    order = np.random.default_rng(3).permutation(8)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    arrays |= {"w1": arrays["w1"][order], "b1": arrays["b1"][order], "w2": arrays["w2"][:, order]}
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))

    pairs = {pair.teacher: pair for pair in found(net, model, inputs).pairs}

    assert pairs["c1"].channels.tolist() == order.tolist()
    assert pairs["c2"].inputs is not None and pairs["c2"].inputs.tolist() == order.tolist()


@pytest.mark.parametrize("name", sorted(set(nets.ALL) - {"asymmetric"}))
def test_every_kind_of_net_is_found_in_itself_under_other_names(name: str) -> None:
    model = nets.build(name)
    net = read_net(model)
    hidden, renamed = foreign.disguised(model, seed=2)

    matching = found(net, hidden, nets.samples(model, 8))

    assert {pair.teacher: pair.student for pair in matching.pairs} == {layer: (renamed[layer],) for layer in net.layers}


def test_a_block_that_is_gone_leaves_its_layers_without_a_pair(images: dict[str, np.ndarray]) -> None:
    """Blocks are removed whole by other tools; the shortcut goes on and so do all other layers."""
    net = teacher("residual")
    copy = cut(net, Patch())
    adds = [node for node in copy.graph.node if node.op_type == "Add"]
    layers = list(net.layers)
    # The second block of the first stage: two layers, added to what they read.
    block, added = layers[3:5], next(node for node in adds if layers[4] in node.input)
    skip = next(name for name in added.input if name not in layers)
    for node in copy.graph.node:
        for at, name in enumerate(node.input):
            if name == added.output[0]:
                node.input[at] = skip
    matching = found(net, copy, images)

    assert list(matching.absent) == block and not matching.alone
    assert all(pair.student == (pair.teacher,) for pair in matching.pairs)


def test_another_teacher_is_refused_and_the_best_guesses_are_listed(images: dict[str, np.ndarray]) -> None:
    net = teacher("vgg")
    stranger = cut(net, Patch())
    random = np.random.default_rng(0)
    for tensor in stranger.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim > 1:
            other = random.standard_normal(array.shape).astype(np.float32) * array.std()
            tensor.CopyFrom(numpy_helper.from_array(other, tensor.name))

    for student in (stranger, teacher("residual").source, teacher("mobile").source):
        matching = found(net, student, images)
        with pytest.raises(ModelError, match=r"does not look like a student of 't.onnx'.* 0\.5 is the least") as error:
            check_alike(matching, ("t.onnx", "s.onnx"), "xdonnx match")
        assert error.value.exit_code == 4 and " as " in str(error.value)


@pytest.mark.parametrize("confidence", [0.2, 0.4951, 0.4999999, 0.5 - 2**-53])
def test_a_refusal_shows_as_many_digits_as_tell_it(confidence: float) -> None:
    pair = Pair("a", ("b",), np.arange(3), None, confidence, "weights")

    with pytest.raises(ModelError, match=r"with a confidence of 0\.\d+") as error:
        check_alike(Matching((pair,), (), ()), ("t.onnx", "s.onnx"), "xdonnx match")

    shown = str(error.value).split("confidence of ")[1].split(", and")[0]
    assert float(shown) < 0.5 and float(shown) == pytest.approx(confidence, abs=0.005)


def test_what_is_given_is_taken_as_it_is(images: dict[str, np.ndarray]) -> None:
    net = teacher("residual")
    first, second = list(net.layers)[1:3]
    order = np.arange(len(net.layers[first].out_ids))[::-1]
    given = {name: Given((name,)) for name in net.layers} | {first: Given((first,), order), second: Given(())}

    matching = found(net, net.source, images, **given)

    pairs = {pair.teacher: pair for pair in matching.pairs}
    assert pairs[first].channels.tolist() == order.tolist() and pairs[first].by == "file"
    assert matching.absent == (second,) and matching.alone == (second,)


@pytest.mark.parametrize("factor", [foreign.spatial, foreign.tucker, foreign.separable])
def test_a_row_comes_to_the_convolution_that_onnxruntime_runs(factor: object) -> None:
    """Strides, pads and dilation included: the response to single pixels is the weight."""
    text = """
g (float[N,3,9,9] image, float[4,3,3,3] w1, float[4,4,3,3] w2) => (float[N,4,h,w] out) {
  c1 = Conv <pads = [1,1,1,1], strides = [2,2]> (image, w1)
  out = Conv <pads = [2,2,2,2], dilations = [2,2]> (c1, w2)
}"""
    model, made = foreign.decomposed(nets.from_text(text), factor, 1.0, skip=["out"])  # type: ignore[arg-type]
    net = read_net(model)
    row = tuple(made["c1"])
    weight = whole_weight(net, row)

    assert rows(net, wired(net), "c1")[-1] == row and weight is not None
    assert len(row) == len(factor(np.ones((4, 3, 3, 3)), 1.0))  # type: ignore[operator]
    model.graph.output.append(onnx.ValueInfoProto(name="c1"))
    pixels = np.zeros((3, 3, 9, 9), np.float32)
    pixels[np.arange(3), np.arange(3), 4, 4] = 1
    # Output (i, j) reads input 2 i - 1 + tap: around the middle pixel lie taps 1 and, one output on, none or more.
    response = answer(open_session(model), {"image": pixels}, ["c1"])["c1"]
    assert np.allclose(response[:, :, 2, 2].T, weight[:, :, 1, 1], atol=1e-5)
    dilated = whole_weight(net, ("out",))
    assert dilated is not None and dilated.shape == (4, 4, 5, 5) and not dilated[..., 1::2, :].any()


def test_what_cannot_stand_for_a_layer_is_said(images: dict[str, np.ndarray]) -> None:
    net = teacher("residual")
    wiring, names = wired(net), list(net.layers)
    first, strided, last = names[0], names[5], names[-1]

    assert "puts out 32 channels" in misfit(net, first, net, wiring, [strided])
    assert "of another kind" in misfit(net, first, net, wiring, [last])
    assert "do not stand in a row" in misfit(net, first, net, wiring, [first, strided])
    assert "turns (16, 16) into (16, 16)" in misfit(net, strided, net, wiring, [first])
    assert misfit(net, first, net, wiring, [first]) == ""
