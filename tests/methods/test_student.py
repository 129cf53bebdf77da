"""The student end to end: its values against onnxruntime's, its weights back into the file, where it is compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import nets
import numpy as np
import onnx
import pytest
import torch

import xdonnx.student
from xdonnx.convert import Program, checked, convert
from xdonnx.graph import Net, read_net
from xdonnx.patch import Patch, cut
from xdonnx.runtime import answer, open_session
from xdonnx.student import Student, Taps, execute, find_taps, open_student, teacher_weights

SIAMESE = """
g (float[N,3,8,8] image, float[N,3,8,8] other, float[6,3,3,3] w1, float[6] b1, float[4,6,1,1] w2, float[4] b2)
  => (float[N,4,8,8] out) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
  c2 = Conv <pads = [1,1,1,1]> (other, w1, b1)
  s = Sub (c1, c2)
  r = Relu (s)
  out = Conv (r, w2, b2)
}"""
BODY = """
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
  r1 = Relu (c1)
  p1 = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r1)
  c2 = Conv <pads = [1,1,1,1]> (p1, w2, b2)
  r2 = Relu (c2)
  p2 = GlobalAveragePool (r2)
  f = Flatten (p2)
  scores = Gemm <transB = 1> (f, w3, b3)
"""
CLASSIFIER = (
    "g (float[N,3,8,8] image, float[8,3,3,3] w1, float[8] b1, float[6,8,3,3] w2, float[6] b2, float[5,6] w3, "
    "float[5] b3) => (OUTPUTS) {" + BODY + "TAIL }"
)


def classifier(outputs: str, tail: str) -> onnx.ModelProto:
    return nets.from_text(CLASSIFIER.replace("OUTPUTS", outputs).replace("TAIL", tail))


def opened(name: str) -> tuple[Net, Program]:
    model = nets.from_text(SIAMESE, images=("image", "other")) if name == "siamese" else nets.build(name)
    net = read_net(model)
    return net, checked(net, convert(net, torch.device("cpu")), nets.samples(model))


def moved(net: Net, seed: int = 3) -> dict[str, np.ndarray]:
    """Return weights and biases that an earlier method might have left: other ones than the teacher's."""
    random = np.random.default_rng(seed)
    names = sorted(name for layer in net.layers.values() for name in (layer.weight, layer.bias) if name)
    arrays = {name: net.array(name) for name in names}
    return {
        name: (array + 0.2 * array.std() * random.standard_normal(array.shape)).astype(np.float32)
        for name, array in arrays.items()
    }


def halved(net: Net) -> frozenset[int]:
    """Return labels of every second channel of every group."""
    return frozenset(int(label) for group in net.groups for label in group.ids[::2])


def patch_of(net: Net, structure: str) -> Patch:
    if structure == "empty":
        return Patch()
    if structure == "channel":
        return Patch(moved(net), halved(net))
    random = np.random.default_rng(4)
    zeroed = {
        name: array * (random.random(array.shape) < 0.5) if array.ndim > 1 else array
        for name, array in moved(net).items()
    }
    return Patch(zeroed, halved(net) if structure == "both" else frozenset())


def tensors(inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(array) for name, array in inputs.items()}


def in_onnxruntime(
    model: onnx.ModelProto, inputs: Mapping[str, np.ndarray], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return values from inside a graph as onnxruntime computes them."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    declared = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in declared)
    return answer(open_session(copy), inputs, names)


def student_of(name: str, patch: Patch) -> tuple[Net, Program, Taps, Student, dict[str, np.ndarray]]:
    net, program = opened(name)
    inputs = nets.samples(net.source)
    taps = find_taps(net, program)
    return net, program, taps, open_student(net, patch, program, taps, tensors(inputs)), inputs


def agree(found: torch.Tensor, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=2e-5 * max(1.0, float(np.abs(expected).max())))


# -------------------------------------------------------------------------------------------------- the same answers


@pytest.mark.parametrize("structure", ["empty", "channel", "element", "both"])
@pytest.mark.parametrize("name", [*nets.ALL, "siamese"])
def test_a_student_computes_at_the_taps_what_its_file_computes_in_onnxruntime(name: str, structure: str) -> None:
    net, _ = opened(name)
    patch = patch_of(net, structure)

    net, _, taps, student, inputs = student_of(name, patch)
    found = execute(student.program, tensors(inputs), student.weights, taps.all)

    expected = in_onnxruntime(cut(net, patch), inputs, taps.all)
    for tap, value in zip(taps.all, found, strict=True):
        agree(value, expected[tap])


@pytest.mark.parametrize("name", nets.ALL)
def test_channels_that_are_gone_are_not_computed(name: str) -> None:
    net, _ = opened(name)
    patch = patch_of(net, "channel")

    *_, student, _ = student_of(name, patch)

    stored = {tensor.name: tuple(tensor.dims) for tensor in cut(net, patch).graph.initializer}
    assert {name: tuple(tensor.shape) for name, tensor in student.weights.items()} == {
        name: stored[name] for name in student.weights
    }
    assert any(tensor.shape != net.array(name).shape for name, tensor in student.weights.items())


def test_teacher_weights_are_every_layers_and_no_others() -> None:
    net, program = opened("product")  # its Add is no layer's bias

    found = teacher_weights(net, program.device)

    assert set(found) == {"w1", "b1", "wm", "wn"}
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.numpy(), net.array(name))


def test_values_are_freed_when_nobody_reads_them_but_what_is_wanted_stays() -> None:
    net, program = opened("residual")
    inputs, names = nets.samples(net.source), ("r0", "c2", "r2", "out")

    found = execute(program, tensors(inputs), teacher_weights(net, program.device), names)

    expected = in_onnxruntime(net.source, inputs, names)
    for name, value in zip(names, found, strict=True):
        agree(value, expected[name])


def test_a_graph_input_may_be_asked_for() -> None:
    net, program = opened("plain")
    inputs = nets.samples(net.source)

    out, image = execute(program, tensors(inputs), teacher_weights(net, program.device), ("out", "image"))

    agree(image, inputs["image"])
    agree(out, answer(open_session(net.source), inputs)["out"])


# --------------------------------------------------------------------------------------------------------- of_teacher


@pytest.mark.parametrize("name", [*nets.ALL, "siamese"])
def test_of_teacher_is_what_the_student_computes_where_only_its_own_channels_mattered(name: str) -> None:
    net, program = opened(name)
    patch = Patch({}, halved(net))
    _, _, taps, student, inputs = student_of(name, patch)

    whole = execute(program, tensors(inputs), teacher_weights(net, program.device), taps.all)
    ours = execute(student.program, tensors(inputs), student.weights, taps.all)

    for tap, theirs, mine in zip(taps.all, whole, ours, strict=True):
        assert student.of_teacher(tap, theirs).shape == mine.shape
        if tap in net.tracks:
            stays = [at for at, label in enumerate(net.tracks[tap].ids) if int(label) not in patch.drop]
            agree(student.of_teacher(tap, theirs), np.take(theirs.numpy(), stays, net.tracks[tap].axis))


@pytest.mark.parametrize("name", ["plain", "transposed", "signal", "volume"])
def test_the_first_layers_channels_that_stay_are_the_teachers_own(name: str) -> None:
    _, program, _, student, inputs = student_of(name, Patch({}, halved(opened(name)[0])))
    net, _ = opened(name)

    (theirs,) = execute(program, tensors(inputs), teacher_weights(net, program.device), ("r1",))
    (mine,) = execute(student.program, tensors(inputs), student.weights, ("r1",))

    agree(student.of_teacher("r1", theirs), mine.numpy())
    assert mine.shape[1] == theirs.shape[1] // 2


def test_without_a_drop_the_teachers_value_is_taken_whole() -> None:
    _, _, _, student, _ = student_of("plain", Patch())
    value = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))

    assert student.of_teacher("r1", value) is value


# -------------------------------------------------------------------------------------------- the cut that fails us


def spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the cut graph answer otherwise than the masked one."""
    whole = xdonnx.student.cut

    def broken(net: Net, patch: Patch) -> onnx.ModelProto:
        made = whole(net, patch)
        for tensor in made.graph.initializer:
            if len(tensor.dims) == 4:
                array = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array * np.float32(1.5), tensor.name))
        return made

    monkeypatch.setattr(xdonnx.student, "cut", broken)


@pytest.mark.parametrize("name", ["plain", "padded", "transposed", "siamese"])
def test_a_cut_graph_that_answers_otherwise_is_not_trained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, program = opened(name)
    patch = patch_of(net, "channel")
    spoilt(monkeypatch)

    net, program, taps, student, inputs = student_of(name, patch)

    assert student.program is program
    (found,) = execute(student.program, tensors(inputs), student.weights, taps.answers)
    agree(found, in_onnxruntime(cut(net, patch), inputs, taps.answers)[taps.answers[0]])


@pytest.mark.parametrize("name", ["plain", "grouped", "transposed", "flatten"])
def test_the_masked_student_comes_back_as_the_same_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = opened(name)
    patch = patch_of(net, "channel")
    spoilt(monkeypatch)
    net, _, taps, student, inputs = student_of(name, patch)
    shaken(student, 5)

    made = student.patch(net, patch)

    (found,) = execute(student.program, tensors(inputs), student.weights, taps.answers)
    agree(found, in_onnxruntime(cut(net, made), inputs, taps.answers)[taps.answers[0]])


# -------------------------------------------------------------------------------------------------- weights go back


def shaken(student: Student, seed: int) -> None:
    """Move every weight, as training would: zeros that are masked stay."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(student.weights.items()):
        moved = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        student.weights[name] = moved * student.masks[name] if name in student.masks else moved


@pytest.mark.parametrize("structure", ["empty", "channel", "element", "both"])
@pytest.mark.parametrize("name", [*nets.ALL, "siamese"])
def test_the_file_of_trained_weights_gives_the_trained_answers(name: str, structure: str) -> None:
    net, _ = opened(name)
    patch = patch_of(net, structure)
    net, _, taps, student, inputs = student_of(name, patch)
    shaken(student, 6)

    made = student.patch(net, patch)

    assert made.drop == patch.drop
    assert {name: array.shape for name, array in made.tensors.items()} == {
        name: net.array(name).shape for name in made.tensors
    }
    assert all(array.dtype == np.float32 for array in made.tensors.values())
    expected = in_onnxruntime(cut(net, made), inputs, taps.all)
    for tap, value in zip(taps.all, execute(student.program, tensors(inputs), student.weights, taps.all), strict=True):
        agree(value, expected[tap])


def test_a_weight_that_two_layers_read_moves_for_both() -> None:
    net, _, _, student, inputs = student_of("siamese", Patch())
    assert net.shared == {"w1"}
    student.weights["w1"] = student.weights["w1"] * 2
    made = student.patch(net, Patch())

    first, second = execute(student.program, tensors(inputs), student.weights, ("c1", "c2"))

    bias = net.array("b1").reshape(1, -1, 1, 1)
    before = in_onnxruntime(net.source, inputs, ("c1", "c2"))
    agree(first, 2 * before["c1"] - bias)
    agree(second, 2 * before["c2"] - bias)
    after = in_onnxruntime(cut(net, made), inputs, ("c1", "c2"))
    agree(first, after["c1"])
    agree(second, after["c2"])


@pytest.mark.parametrize("name", ["plain", "grouped", "product"])
def test_weights_that_did_not_move_come_back_bit_by_bit(name: str) -> None:
    net, _ = opened(name)
    patch = patch_of(net, "both")
    *_, student, _ = student_of(name, patch)

    made = student.patch(net, patch)

    before, after = ({t.name: t.SerializeToString() for t in cut(net, p).graph.initializer} for p in (patch, made))
    assert after == before


def test_a_patch_that_is_handed_back_leaves_the_first_one_alone() -> None:
    net, _ = opened("plain")
    patch = patch_of(net, "channel")
    before = {name: array.copy() for name, array in patch.tensors.items()}
    *_, student, _ = student_of("plain", patch)
    shaken(student, 7)

    student.patch(net, patch)

    for name, array in patch.tensors.items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("name", ["plain", "grouped", "depthwise", "product"])
def test_masks_are_where_weights_are_zero_and_biases_have_none(name: str) -> None:
    net, _ = opened(name)
    patch = patch_of(net, "element")
    zero_bias = {layer.bias: np.zeros_like(net.array(layer.bias)) for layer in net.layers.values() if layer.bias}

    *_, student, _ = student_of(name, patch.plus(zero_bias))

    assert set(student.masks) == {layer.weight for layer in net.layers.values()}
    for name, mask in student.masks.items():
        np.testing.assert_array_equal(mask.numpy(), patch.tensors[name] != 0)


# --------------------------------------------------------------------------------------------------------------- taps


def taps_of(model: onnx.ModelProto, sizes: Mapping[str, Sequence[int]] | None = None) -> Taps:
    net = read_net(model, sizes)
    return find_taps(net, convert(net, torch.device("cpu")))


def test_taps_are_stage_ends_the_features_before_pooling_and_the_answers() -> None:
    taps = taps_of(classifier("float[N,5] scores", ""))

    assert taps == Taps(("r1", "r2"), ("scores",))  # 8x8 ends at r1, 4x4 at r2, which the pooling reads
    assert taps.all == ("r1", "r2", "scores")


@pytest.mark.parametrize("squash", ["Softmax <axis = 1>", "LogSoftmax <axis = 1>"])
def test_scores_are_compared_before_a_softmax(squash: str) -> None:
    assert taps_of(classifier("float[N,5] shares", f"shares = {squash} (scores)")).answers == ("scores",)
    twice = classifier("float[N,5] shares", f"once = {squash} (scores) shares = Identity (once)")
    assert taps_of(twice).answers == ("scores",)


def test_a_sigmoid_is_no_softmax_and_stays() -> None:
    assert taps_of(classifier("float[N,5] rates", "rates = Sigmoid (scores)")).answers == ("rates",)


def test_every_floating_output_is_an_answer_and_an_integer_one_is_none() -> None:
    model = classifier(
        "float[N,5] shares, int64[N] winner, float[N,6] features",
        "shares = Softmax <axis = 1> (scores) winner = ArgMax <axis = 1, keepdims = 0> (scores) "
        "features = Identity (f)",
    )

    taps = taps_of(model)

    assert taps.answers[0] == "scores" and len(taps.answers) == 2
    assert taps.answers[1] in ("features", "f")


def test_scores_and_their_softmax_are_compared_once() -> None:
    taps = taps_of(classifier("float[N,5] scores, float[N,5] shares", "shares = Softmax <axis = 1> (scores)"))

    assert taps.all == ("r1", "r2", "scores")


def test_an_answer_is_no_stage_as_well() -> None:
    taps = taps_of(classifier("float[N,5] scores, float[N,6,4,4] r2", ""))

    assert taps == Taps(("r1",), ("scores", "r2"))
    assert taps_of(nets.build("concat")) == Taps((), ("out",))


def test_a_regression_output_is_an_answer() -> None:
    model = nets.from_text(
        """
g (float[N,3,8,8] image, float[4,3,3,3] w1, float[4] b1, float[1,4] w2) => (float[N,1] price) {
  c1 = Conv (image, w1, b1)
  r1 = Relu (c1)
  p = GlobalAveragePool (r1)
  f = Flatten (p)
  price = Gemm <transB = 1> (f, w2)
}"""
    )
    assert taps_of(model) == Taps(("r1",), ("price",))


def test_what_no_weight_moves_is_no_tap() -> None:
    model = nets.from_text(
        """
g (float[N,3,8,8] image, float[4,3,3,3] w1, float[4] b1, float[4,4,1,1] w2)
  => (float[N,4,1,1] out, float[N,3,4,4] thumb) {
  thumb = AveragePool <kernel_shape = [2,2], strides = [2,2]> (image)
  wide = Relu (image)
  c1 = Conv (image, w1, b1)
  r1 = Relu (c1)
  p = GlobalAveragePool (r1)
  out = Conv (p, w2)
}"""
    )

    assert taps_of(model) == Taps(("r1",), ("out",))


def test_of_many_sizes_the_last_ones_are_compared() -> None:
    pools = "".join(
        f"  c{at} = Conv <pads = [1,1,1,1]> (p{at - 1}, w{at})\n"
        f"  p{at} = MaxPool <kernel_shape = [2,2], strides = [2,2]> (c{at})\n"
        for at in range(1, 8)
    )
    weights = ", ".join(f"float[2,{1 if at == 1 else 2},3,3] w{at}" for at in range(1, 8))
    model = nets.from_text(
        f"g (float[N,1,256,256] p0, {weights}) => (float[N,2,1,1] out) {{\n{pools}  out = GlobalMaxPool (p7)\n}}",
        images=("p0",),
    )

    taps = taps_of(model)

    # 256 ends at c1, 128 at c2, ..., 4 at c7 and 2 at p7: eight sizes.
    assert taps.stages == tuple(["c4", "c5", "c6", "c7", "p7"][-xdonnx.student.MOST_STAGES :])
    assert taps.answers == ("out",)
