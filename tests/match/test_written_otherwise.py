"""The same network may be written in two ways; a refit does not mind which of them teacher and student are in."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from xdonnx.budget import Budget, make_plan
from xdonnx.convert import convert
from xdonnx.errors import NothingToDo, ShotsError
from xdonnx.events import Event
from xdonnx.foreign import refitted
from xdonnx.gate import Gate
from xdonnx.given import GivenStudent, nonzero, size
from xdonnx.graph import Net, read_net
from xdonnx.job import Job, run
from xdonnx.likeness import outputs_of
from xdonnx.matching import Given, match, side
from xdonnx.methods.bench import Bench
from xdonnx.methods.cross import Cross
from xdonnx.methods.fskd import FSKD
from xdonnx.methods.mixing import trace
from xdonnx.methods.pairwalk import Meeting, _behind, meet
from xdonnx.patch import Patch, cut
from xdonnx.runtime import answer, open_session
from xdonnx.shots import Shots

PLAIN = """
g (float[N,3,8,8] image, float[8,3,3,3] w0, float[8] b0, float[16,8,3,3] w1, float[16] b1, float[8,16,3,3] w2,
   float[8] b2, float[8,12] wd, float[12] bd, float[12,5] wf, float[5] bf) => (float[N,5] out) {
  c0 = Conv <pads = [1,1,1,1]> (image, w0, b0)
  r0 = Relu (c0)
  c1 = Conv <pads = [1,1,1,1]> (r0, w1, b1)
  r1 = Relu (c1)
  c2 = Conv <pads = [1,1,1,1]> (r1, w2, b2)
  r2 = Relu (c2)
  p = GlobalAveragePool (r2)
  f = Flatten (p)
  d = Gemm (f, wd, bd)
  e = Relu (d)
  out = Gemm (e, wf, bf)
}"""
LATER = "c1a = Conv <pads = [1,1,1,1]> (r0, w1)\n  "
WRITINGS = {
    "plain": (),
    "products": (
        ("d = Gemm (f, wd, bd)", "da = MatMul (f, wd)\n  d = Add (bd, da)"),
        ("out = Gemm (e, wf, bf)", "oa = MatMul (e, wf)\n  out = Add (oa, bf)"),
    ),
    "bias behind": (
        ("float[16] b1", "float[1,16,1,1] b1"),
        ("c1 = Conv <pads = [1,1,1,1]> (r0, w1, b1)", LATER + "c1 = Add (c1a, b1)"),
    ),
    "bias taken off": (
        ("float[16] b1", "float[16,1,1] b1"),
        ("c1 = Conv <pads = [1,1,1,1]> (r0, w1, b1)", LATER + "c1 = Sub (c1a, b1)"),
    ),
    "scaled behind": (
        ("float[16] b1", "float[1,16,1,1] gain, float[1,16,1,1] b1"),
        ("c1 = Conv <pads = [1,1,1,1]> (r0, w1, b1)", LATER + "c1b = Mul (c1a, gain)\n  c1 = Add (c1b, b1)"),
    ),
    "divided behind": (
        ("float[16] b1", "float[1,16,1,1] gain, float[1,16,1,1] b1"),
        ("c1 = Conv <pads = [1,1,1,1]> (r0, w1, b1)", LATER + "c1b = Div (c1a, gain)\n  c1 = Add (c1b, b1)"),
    ),
}
GAIN = np.linspace(0.3, 3, 16).astype(np.float32)


@cache
def written(how: str) -> onnx.ModelProto:
    """Return the network of `PLAIN` in another writing: the same answers to every image."""
    text = PLAIN
    for old, new in WRITINGS[how]:
        assert old in text
        text = text.replace(old, new)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in nets.from_text(PLAIN).graph.initializer}
    values["b1"] = np.linspace(-1, 2, 16).astype(np.float32)
    values["bd"] = np.linspace(-1, 2, 12).astype(np.float32)
    values["bf"] = np.array([2, -1, 3, 0, 1], np.float32)
    values["gain"] = GAIN
    factor = {"scaled behind": 1 / GAIN, "divided behind": GAIN}.get(how)
    model = nets.from_text(text)
    for tensor in model.graph.initializer:
        array = values[tensor.name]
        if tensor.name == "w1" and factor is not None:
            array = array * factor[:, None, None, None]
        if tensor.name == "b1" and how == "bias taken off":
            array = -array
        array = np.ascontiguousarray(array.reshape(tuple(tensor.dims))).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


def images(rows: int, seed: int) -> dict[str, np.ndarray]:
    return {"image": np.abs(nets.samples(written("plain"), rows=rows, seed=seed)["image"])}


def cut_to(net: Net, share: float = 0.75) -> onnx.ModelProto:
    """Return the student that lacks the last filters of each layer, in whatever writing the teacher is."""
    drop: list[int] = []
    for at, keep in make_plan(net, Budget("keep", share)).channels.items():
        drop += [int(label) for label in net.groups[at].ids[keep:]]
    return cut(net, Patch({}, frozenset(drop)))


def error(student: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> float:
    wanted, made = (answer(open_session(one), inputs)["out"] for one in (written("plain"), student))
    return float(np.square(made - wanted).sum() / np.square(wanted).sum())


def refit(net: Net, given: Net, shown: dict[str, np.ndarray], method: Any) -> onnx.ModelProto:
    """Return a student that was matched with its teacher and refitted on the samples shown."""
    bench = Bench(convert(net, torch.device("cpu")), torch.Generator().manual_seed(0))
    shots = Shots(shown, None, tuple(map(str, range(len(next(iter(shown.values())))))))
    matching = match(side(net, shown), side(given, shown))
    made, _ = refitted([method], net, GivenStudent(given, matching), shots, bench)
    return made


def thinned(share: float) -> onnx.ModelProto:
    """Return the network with this share of its convolutions' weights set to zero, the smallest."""
    model = onnx.ModelProto.FromString(written("plain").SerializeToString())
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if array.ndim == 4:
            array[np.abs(array) < np.quantile(np.abs(array), share)] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


@cache
def errors(teacher: str, student: str, method: str) -> tuple[float, float]:
    """Return the error of a student on new images, before its refit and after."""
    net, given = read_net(written(teacher)), read_net(cut_to(read_net(written(student))))
    made: Any = {"fskd": FSKD(), "fast": Cross(effort="fast"), "balanced": Cross()}[method]
    after = refit(net, given, images(40, 1), made)
    return error(given.source, images(60, 3)), error(after, images(60, 3))


@pytest.mark.parametrize("how", WRITINGS)
def test_all_writings_answer_alike(how: str) -> None:
    shown = images(20, 5)
    plain, other = (answer(open_session(written(one)), shown)["out"] for one in ("plain", how))
    assert np.allclose(plain, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["fskd", "fast", "balanced"])
@pytest.mark.parametrize("other", [how for how in WRITINGS if how != "plain"])
def test_a_refit_is_as_good_whichever_way_teacher_and_student_are_written(other: str, method: str) -> None:
    before, alike = errors("plain", "plain", method)
    assert alike < before / 5
    for teacher, student in ((other, "plain"), ("plain", other), (other, other)):
        _, after = errors(teacher, student, method)
        assert after < 1.5 * alike, (teacher, student)


def test_a_constant_that_is_also_put_out_on_its_way_changes_nothing() -> None:
    """What a layer puts out is an output of the graph here, so that the constant behind it is no part of the layer."""
    model = onnx.ModelProto.FromString(written("bias behind").SerializeToString())
    model.graph.output.append(onnx.helper.make_tensor_value_info("c1a", onnx.TensorProto.FLOAT, ["N", 16, 8, 8]))
    net = read_net(model)
    cpu = torch.device("cpu")
    by, plus = _behind(net, convert(net, cpu), net.layers["c1a"])
    assert torch.equal(by, torch.ones_like(by)) and not plus.any()
    alone = read_net(written("bias behind"))
    by, plus = _behind(alone, convert(alone, cpu), alone.layers["c1a"])
    assert np.allclose(plus, np.linspace(-1, 2, 16), atol=1e-6)


POOLED = ("r1 = Relu (c1)", "r1 = MaxPool <kernel_shape = [2,2], strides = [2,2]> (c1)")
BEFORE = (*WRITINGS["bias behind"], POOLED)
AFTER = (
    ("float[16] b1", "float[1,16,1,1] b1"),
    ("c1 = Conv <pads = [1,1,1,1]> (r0, w1, b1)", "c1a = Conv <pads = [1,1,1,1]> (r0, w1)"),
    ("r1 = Relu (c1)", "r1a = MaxPool <kernel_shape = [2,2], strides = [2,2]> (c1a)\n  r1 = Add (r1a, b1)"),
)


def test_where_networks_go_on_in_another_way_their_outputs_say_what_is_meant() -> None:
    """A constant before the pool of one is the constant behind the pool of the other: neither moves the target."""

    def made(changes: tuple[tuple[str, str], ...]) -> onnx.ModelProto:
        text = PLAIN
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        model = nets.from_text(text)
        held = {tensor.name: numpy_helper.to_array(tensor) for tensor in written("plain").graph.initializer}
        for tensor in model.graph.initializer:
            array = np.ascontiguousarray(held[tensor.name].reshape(tuple(tensor.dims)))
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return model

    shown, new = images(40, 1), images(60, 3)
    networks = {"in": made((POOLED,)), "before": made(BEFORE), "after": made(AFTER)}
    wanted = answer(open_session(networks["in"]), new)["out"]
    found = {}
    for teacher, student in (("in", "in"), ("before", "after"), ("after", "before")):
        net, given = read_net(networks[teacher]), read_net(cut_to(read_net(networks[student])))
        after = refit(net, given, shown, Cross(effort="fast"))
        found[teacher, student] = float(np.square(answer(open_session(after), new)["out"] - wanted).sum())
    assert max(found.values()) < 2 * found["in", "in"], found


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_a_transposed_convolution_with_more_outputs_than_inputs_is_refitted(effort: str) -> None:
    text = """
g (float[N,3,6,6] image, float[4,3,3,3] w0, float[4] b0, float[4,12,2,2] w1, float[12] b1, float[5,12,1,1] w2,
   float[5] b2) => (float[N,5,12,12] out) {
  c0 = Conv <pads = [1,1,1,1]> (image, w0, b0)
  r0 = Relu (c0)
  c1 = ConvTranspose <strides = [2,2]> (r0, w1, b1)
  r1 = Relu (c1)
  out = Conv (r1, w2, b2)
}"""
    model = nets.from_text(text)
    net, given = read_net(model), read_net(cut_to(read_net(model)))
    shown, new = (nets.samples(model, rows=rows, seed=seed) for rows, seed in ((40, 1), (60, 3)))
    after = refit(net, given, shown, Cross(effort=effort))
    wanted, before, made = (answer(open_session(one), new)["out"] for one in (model, given.source, after))
    assert np.square(made - wanted).sum() < 0.9 * np.square(before - wanted).sum()


@pytest.mark.parametrize("passed", [True, False])
def test_what_a_trace_says_is_the_error_of_what_passes_the_relu(passed: bool) -> None:
    net, given = read_net(written("plain")), read_net(cut_to(read_net(written("plain"))))
    shown = images(30, 1)
    pairs = {pair.student[-1]: pair for pair in match(side(net, shown), side(given, shown)).pairs}
    cpu, found = torch.device("cpu"), {}

    def visit(meeting: Meeting) -> None:
        if meeting.layer.name == "c2":
            weights = (0.9 * meeting.weight, meeting.bias)
            found["trace"] = trace(meeting, weights, frozenset({"c2"} if passed else ()), 0.0)

    meet((net, convert(net, cpu)), (given, convert(given, cpu)), pairs, shown, visit, {}, lambda event: None)

    def outputs(model: onnx.ModelProto, factor: float) -> np.ndarray:
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        for tensor in copy.graph.initializer:
            if tensor.name == "w2":
                tensor.CopyFrom(numpy_helper.from_array(np.float32(factor) * numpy_helper.to_array(tensor), "w2"))
        copy.graph.output.append(onnx.helper.make_tensor_value_info("c2", onnx.TensorProto.FLOAT, None))
        made = answer(open_session(copy), shown)["c2"]
        return np.maximum(made, 0) if passed else made

    kept = pairs["c2"].channels
    wanted = outputs(written("plain"), 1)[:, kept]
    for factor, share in ((1.0, found["trace"].objective_before), (0.9, found["trace"].objective_after)):
        missed = np.square(outputs(given.source, factor) - wanted).sum() / np.square(wanted).sum()
        assert share == pytest.approx(missed, rel=1e-4)


EASY = Gate(warn_only=("smaller", "not_slower", "removed"))


def job(folder: Path, **options: Any) -> Job:
    np.savez(folder / "shots.npz", **images(40, 1))
    np.savez(folder / "held.npz", **images(60, 3))
    onnx.save(written("plain"), folder / "teacher.onnx")
    onnx.save(cut_to(read_net(written("plain"))), folder / "given.onnx")
    given: dict[str, Any] = {
        "model": folder / "teacher.onnx",
        "student": folder / "given.onnx",
        "shots": (str(folder / "shots.npz"),),
        "holdout": str(folder / "held.npz"),
        "out": folder / "out.onnx",
        "gate": EASY,
    }
    return Job(**{**given, **options})


def test_a_batch_that_is_fixed_wants_that_many_samples() -> None:
    model = onnx.ModelProto.FromString(written("plain").SerializeToString())
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    net = read_net(model)
    with pytest.raises(ShotsError, match="takes 4 samples at once, and there are 3"):
        outputs_of(net, images(3, 1))
    assert len(outputs_of(net, images(9, 1))["c1"][0]) > 0


@pytest.mark.parametrize("shots", [1, 3, 7])
def test_few_samples_are_enough_where_the_batch_is_free(shots: int, tmp_path: Path) -> None:
    report = run(job(tmp_path, max_shots=shots, method="fskd"))
    assert report.fit_samples == shots and report.given is not None and report.fidelity is not None
    before, after = report.given.outputs[0].relative_l2, report.fidelity.outputs[0].relative_l2
    assert before is not None and after is not None and after < before


def test_a_refit_that_makes_answers_worse_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(methods: Any, teacher: Net, given: GivenStudent, *rest: Any) -> tuple[onnx.ModelProto, list[Any]]:
        model = onnx.ModelProto.FromString(given.net.source.SerializeToString())
        for tensor in model.graph.initializer:
            if tensor.name == "wf":
                tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), "wf"))
        return model, []

    asked = job(tmp_path)
    assert not any("worse" in warning for warning in run(asked).warnings)
    monkeypatch.setattr("xdonnx.job.refitted", spoiled)
    warned = [text for text in run(asked.model_copy(update={"force": True})).warnings if "answers worse" in text]
    assert len(warned) == 1 and "xdonnx match" in warned[0] and "relative L2" in warned[0]


def test_channels_behind_a_layer_without_a_pair_may_be_in_any_order() -> None:
    net = read_net(written("plain"))
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in written("plain").graph.initializer}
    order = np.random.default_rng(5).permutation(8)
    model = onnx.ModelProto.FromString(written("plain").SerializeToString())
    for tensor in model.graph.initializer:
        array = {"w0": values["w0"][order], "b0": values["b0"][order], "w1": values["w1"][:, order]}.get(tensor.name)
        if array is not None:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    shown = images(40, 1)
    given = {name: Given((name,)) for name in net.layers} | {"c0": Given(())}

    pairs = {pair.teacher: pair for pair in match(side(net, shown), side(read_net(model), shown), given).pairs}

    assert pairs["c1"].inputs is None
    assert pairs["c2"].inputs is not None and pairs["c2"].inputs.tolist() == list(range(16))


def test_channels_that_a_file_gives_are_as_sure_as_they_look() -> None:
    net, shown = read_net(written("plain")), images(40, 1)
    given = {name: Given((name,)) for name in net.layers}
    wrong = given | {"c1": Given(("c1",), np.arange(16)[::-1].copy())}
    right, turned = (
        {pair.teacher: pair.confidence for pair in match(side(net, shown), side(net, shown), one).pairs}
        for one in (given, wrong)
    )
    assert right["c1"] > 0.99 > 0.5 > turned["c1"]


def test_a_pair_that_is_hardly_alike_is_left_as_it_is_unless_a_file_vouches_for_it(tmp_path: Path) -> None:
    net = read_net(written("plain"))
    model = cut_to(net)
    random = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if tensor.name == "w1":
            made = random.standard_normal(tuple(tensor.dims)).astype(np.float32) / 5
            tensor.CopyFrom(numpy_helper.from_array(made, tensor.name))
    given, shown = read_net(model), images(40, 1)
    found = match(side(net, shown), side(given, shown))
    assert next(pair for pair in found.pairs if pair.teacher == "c1").confidence < 0.25
    held = match(side(net, shown), side(given, shown), {pair.teacher: Given(pair.student) for pair in found.pairs})
    bench = Bench(convert(net, torch.device("cpu")), torch.Generator().manual_seed(0))
    shots = Shots(shown, None, tuple(map(str, range(40))))
    for matching, moves in ((found, False), (held, True)):
        after, rows = refitted([FSKD()], net, GivenStudent(given, matching), shots, bench)
        made = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}["w1"]
        same = np.array_equal(made, given.array("w1"))
        assert same is not moves
        assert (next(row for row in rows if row.layer == "c1").objective_after is not None) is moves


def test_what_a_student_does_not_lack_is_not_refitted(tmp_path: Path) -> None:
    asked = job(tmp_path)
    again = onnx.ModelProto.FromString(written("plain").SerializeToString())
    again.doc_string = "exported again"
    onnx.save(again, tmp_path / "given.onnx")
    with pytest.raises(NothingToDo, match=r"no fewer weights than the teacher(.|\n)*--match") as raised:
        run(asked)
    assert raised.value.exit_code == 7 and not (tmp_path / "out.onnx").exists()


def test_a_dense_student_of_a_thinned_teacher_lacks_channels(tmp_path: Path) -> None:
    asked = job(tmp_path, method="fskd")
    onnx.save(thinned(0.6), tmp_path / "teacher.onnx")
    teacher, student = read_net(thinned(0.6)), read_net(onnx.load(tmp_path / "given.onnx"))
    assert nonzero(student) > nonzero(teacher) and size(student) < size(teacher)
    assert run(asked).exit_code == 0


def test_weights_outside_the_file_tell_a_student_from_its_teacher(tmp_path: Path) -> None:
    asked = job(tmp_path)
    for folder, model in (("t", written("plain")), ("s", thinned(0.5))):
        (tmp_path / folder).mkdir()
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        path = tmp_path / folder / "model.onnx"
        onnx.save_model(copy, path, save_as_external_data=True, location="model.data", size_threshold=0)
    files = [tmp_path / folder / "model.onnx" for folder in ("t", "s")]
    assert files[0].read_bytes() == files[1].read_bytes()
    events: list[Event] = []

    report = run(asked.model_copy(update={"model": files[0], "student": files[1]}), events.append)

    assert report.exit_code == 0 and report.student and report.teacher
    assert report.student.nonzero < 0.8 * report.teacher.nonzero
