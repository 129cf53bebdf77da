"""A student of another tool is refitted: exactly merged, better than before, and its structure stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foreign
import nets
import numpy as np
import onnx
import pytest
import torch
from helpers import same_answers, same_interface
from onnx import helper, numpy_helper

from xdonnx.budget import Budget, make_plan
from xdonnx.convert import convert
from xdonnx.errors import JobError, ModelError, NothingToDo
from xdonnx.events import Event, ignore
from xdonnx.gate import Gate
from xdonnx.given import matched
from xdonnx.graph import Net, read_net
from xdonnx.images import Preprocess
from xdonnx.job import Job, run
from xdonnx.matchfile import written
from xdonnx.matching import Matching, match, side
from xdonnx.methods import crossing
from xdonnx.methods.joint import producer_norms
from xdonnx.methods.mixing import Mixing
from xdonnx.methods.pairwalk import Meeting, Weights, meet
from xdonnx.model import fingerprint, read_proto
from xdonnx.patch import Patch, cut
from xdonnx.report import Report
from xdonnx.runtime import answer_all, open_session
from xdonnx.wiring import wired

SAMPLES = Path(__file__).parents[2] / "samples"
FAST: dict[str, dict[str, object]] = {"cross": {"preset_effort": "fast"}, "fskd": {}}
EASY = Gate(warn_only=("smaller", "not_slower", "removed"))


def halved(net: Net) -> onnx.ModelProto:
    """Return the student that keeps the larger half of the filters."""
    drop: list[int] = []
    for at, keep in make_plan(net, Budget("keep", 0.5)).channels.items():
        order = np.argsort(-producer_norms(net, net.groups[at]), kind="stable")
        drop += [int(net.groups[at].ids[unit]) for unit in order[keep:]]
    return cut(net, Patch({}, frozenset(drop)))


def job(folder: Path, teacher: str, made: onnx.ModelProto, **options: object) -> Job:
    onnx.save(made, folder / "given.onnx")
    given = {
        "model": SAMPLES / f"digits_{teacher}.onnx",
        "student": folder / "given.onnx",
        "out": folder / "student.onnx",
        "shots": (str(SAMPLES / "shots"),),
        "holdout": str(SAMPLES / "held_out.npz"),
        "preprocess": Preprocess("unit"),
        "per_class": 4,
        "gate": EASY,
    }
    return Job(**{**given, **options})  # type: ignore[arg-type]


def accuracy(model: onnx.ModelProto | Path, digits: tuple[np.ndarray, np.ndarray]) -> float:
    pixels = digits[0].astype(np.float32) / 255
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    (logits,) = answer_all(open_session(model), {"image": pixels}, batch=150).values()
    return 100 * float((logits.argmax(1) == digits[1]).mean())


def structure(model: onnx.ModelProto) -> list[tuple[str, list[str]]]:
    return [(node.op_type, list(node.input)) for node in model.graph.node]


@pytest.fixture(scope="module")
def shown(digits: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    pixels = digits[0][:40].astype(np.float32) / 255
    return {"image": pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)}


def pairs_of(net: Net, given: Net, inputs: dict[str, np.ndarray]) -> Matching:
    return match(side(net, inputs), side(given, inputs))


@pytest.mark.parametrize("teacher", ["vgg", "residual", "mobile"])
def test_merged_and_unmerged_1x1_layers_answer_alike(teacher: str, shown: dict[str, np.ndarray]) -> None:
    """The unmerged graph is really built: behind every matched convolution stands a convolution of its own."""
    net = read_net(read_proto(SAMPLES / f"digits_{teacher}.onnx"))
    given = read_net(halved(net))
    cpu = torch.device("cpu")
    mixing = Mixing(given, 40, 40)
    pairs = {pair.student[-1]: pair for pair in pairs_of(net, given, shown).pairs}
    meet((net, convert(net, cpu)), (given, convert(given, cpu)), pairs, shown, mixing, {}, ignore)
    merged, unmerged = cut(given, Patch(mixing.tensors)), cut(given, Patch())

    nodes = []
    for node in unmerged.graph.node:
        nodes.append(node)
        mixer = mixing.mixers.get(node.output[0])
        if mixer is None:
            continue
        name, groups = node.output[0], len(mixer.q)
        kernel = [1] * (len(given.shapes[name]) - 2)
        weight = mixer.q.reshape(groups * mixer.q.shape[1], -1, *kernel).numpy().astype(np.float32)
        node.output[0] = f"{name}_before"
        assert mixer.constant is not None
        constant = mixer.constant.flatten().numpy().astype(np.float32)
        for array, what in ((weight, "q"), (constant, "c")):
            unmerged.graph.initializer.append(numpy_helper.from_array(array, f"{name}_{what}"))
        inputs = [f"{name}_before", f"{name}_q", f"{name}_c"]
        if kernel:
            nodes.append(helper.make_node("Conv", inputs, [name], group=groups))
        else:
            nodes.append(helper.make_node("Gemm", inputs, [name], transB=1))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del unmerged.graph.node[:]
    unmerged.graph.node.extend(copies)

    assert len(mixing.mixers) == len(given.layers) and len(copies) == len(merged.graph.node) + len(given.layers)
    assert structure(merged) == structure(cut(given, Patch()))
    same_answers(merged, unmerged, shown, tolerance=1e-5)


def test_a_mixer_is_the_least_squares_fit_of_outputs(shown: dict[str, np.ndarray]) -> None:
    """Of the first layer, where nothing is pulled and no ReLU counts, it is what numpy finds."""
    net = read_net(read_proto(SAMPLES / "digits_vgg.onnx"))
    given = read_net(halved(net))
    cpu, first = torch.device("cpu"), next(iter(net.layers))
    second = list(net.layers)[1]
    mixing = Mixing(given, 40, 40, ridge=0.0)
    pairs = {pair.student[-1]: pair for pair in pairs_of(net, given, shown).pairs}
    only = {second: pairs[second]}
    meet((net, convert(net, cpu)), (given, convert(given, cpu)), only, shown, mixing, {}, ignore)

    values = []
    for model, name in ((net, second), (given, second)):
        proto = cut(model, Patch())
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
        made = open_session(proto).run([name], shown)[0]
        values.append(made.transpose(1, 0, 2, 3).reshape(made.shape[1], -1).astype(np.float64))
    y, z = values[0][pairs[second].channels], np.vstack([values[1], np.ones(values[1].shape[1])])
    best = np.linalg.lstsq(z.T, y.T, rcond=None)[0].T
    mixer = mixing.mixers[second]
    assert mixer.constant is not None and first not in mixing.mixers
    ours = np.hstack([mixer.q[0].numpy(), mixer.constant.numpy().T])
    # 256 positions of 40 images are fewer than what is looked at, so both saw the same.
    errors = [float(((matrix @ z - y) ** 2).sum()) for matrix in (best, ours)]
    assert errors[1] <= errors[0] * (1 + 1e-4)


@pytest.mark.parametrize(("teacher", "least"), [("vgg", 90), ("mobile", 75)])
def test_both_methods_win_back_what_l1_norm_lost(
    teacher: str, least: float, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    net = read_net(read_proto(SAMPLES / f"digits_{teacher}.onnx"))
    given, _ = foreign.disguised(halved(net))
    reports: dict[str, Report] = {}
    for method in ("fskd", "cross"):
        folder = tmp_path / method
        folder.mkdir()
        reports[method] = run(job(folder, teacher, given, method=method, **FAST[method]))
        student = read_proto(folder / "student.onnx")
        same_interface(read_proto(SAMPLES / f"digits_{teacher}.onnx"), student)
        assert structure(student) == structure(cut(read_net(given), Patch()))
    found = {name: report.fidelity.accuracy_student for name, report in reports.items() if report.fidelity}

    before = accuracy(given, digits)
    assert before < 40 and found["fskd"] > before + 25 and found["cross"] > least
    assert all(one.given and one.given.accuracy_student == pytest.approx(before) for one in reports.values())
    assert found["cross"] == pytest.approx(accuracy(tmp_path / "cross" / "student.onnx", digits))
    matches = reports["cross"].matches
    assert [one.teacher for one in matches] == list(net.layers) and all(one.confidence > 0.99 for one in matches)
    assert {one.kept for one in matches} != {one.units for one in matches}


@pytest.mark.parametrize(
    ("factor", "method"), [(foreign.spatial, "fskd"), (foreign.tucker, "cross"), (foreign.separable, "cross")]
)
def test_a_decomposed_student_is_refitted_at_the_ends_of_its_rows(
    factor: object, method: str, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    teacher = read_proto(SAMPLES / "digits_residual.onnx")
    given, made = foreign.decomposed(teacher, factor, 0.3)  # type: ignore[arg-type]

    report = run(job(tmp_path, "residual", given, method=method, **FAST[method]))

    student = read_proto(tmp_path / "student.onnx")
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in cut(read_net(given), Patch()).graph.initializer}
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in student.graph.initializer}
    assert before.keys() == after.keys() and all(before[name].shape == after[name].shape for name in before)
    for row in made.values():
        assert all(np.array_equal(before[f"{name}_weight{at}"], after[f"{name}_weight{at}"])
                   for at, name in enumerate(row[:-1])), "only the end of a row is refitted"  # fmt: skip
        assert not np.array_equal(before[f"{row[-1]}_weight{len(row) - 1}"], after[f"{row[-1]}_weight{len(row) - 1}"])
    assert report.fidelity and report.fidelity.accuracy_student is not None
    assert report.fidelity.accuracy_student > accuracy(given, digits)
    rows = [one for one in report.matches if len(one.student) > 1]
    assert len(rows) == len(made) and "decomposed" not in report.reasons


def test_one_method_goes_on_where_the_other_stopped(tmp_path: Path) -> None:
    net = read_net(read_proto(SAMPLES / "digits_mobile.onnx"))
    both = run(job(tmp_path, "mobile", halved(net), method=("fskd", "cross"), preset_effort="fast"))

    errors = [layer for layer in both.layers if layer.objective_before and layer.objective_after is not None]
    assert errors and sum(layer.objective_after or 0 for layer in errors) < sum(
        layer.objective_before or 0 for layer in errors
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"macs": 0.5}, "--macs has no say where --student is given"),
        ({"pool": ("pool",)}, "--pool does not go with --student"),
        ({"keep": 0.5}, "--keep has no say"),
        ({"plan": Path("plan.toml")}, "--plan has no say"),
        ({"structure": "element"}, "--structure has no say"),
        ({"exclude": ("a*",)}, "--exclude has no say"),
        ({"residual": True}, "--residual has no say"),
        ({"allocation": "uniform"}, "--allocation has no say"),
        ({"method": ("cross", "tune")}, "--method tune does not refit a given --student"),
        ({"method": "thinet"}, "Those that do: cross, fskd"),
        ({"preset_effort": "best"}, "--preset-effort best does not go with --student"),
        ({"solver": "pgd"}, "--solver chooses what goes"),
        ({"student": None, "match": Path("match.toml")}, "--match says how a given student is matched"),
        ({"match": Path("none.toml")}, "no matching at 'none.toml'"),
    ],
)
def test_what_makes_no_sense_with_a_student_is_a_usage_error(
    options: dict[str, object], words: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr("xdonnx.wanted.read_planfile", lambda _: SimpleNamespace(structure="channel"))
    teacher = read_proto(SAMPLES / "digits_mobile.onnx")
    with pytest.raises(JobError, match=words) as error:
        run(job(here, "mobile", teacher, **options))
    assert error.value.exit_code == 2 and not (here / "student.onnx").exists()


def test_a_student_that_is_none_is_a_model_error_that_names_the_file(tmp_path: Path) -> None:
    teacher = read_proto(SAMPLES / "digits_mobile.onnx")
    asked = job(tmp_path, "mobile", teacher)
    given = tmp_path / "given.onnx"
    renamed = read_proto(SAMPLES / "digits_mobile.onnx")
    renamed.graph.input[0].name = "pixels"
    for node in renamed.graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = "pixels" if name == "image" else name
    plain = '<ir_version: 8, opset_import: ["": 17]> g (float[N,1,16,16] image) => (float[N,1,16,16] logits) '
    plain += "{ logits = Relu (image) }"
    for content, words in (
        (b"", "given.onnx"),
        (b"no model", "given.onnx"),
        (renamed.SerializeToString(), "cannot stand in for the teacher"),
        (onnx.parser.parse_model(plain).SerializeToString(), "cannot stand in for the teacher"),
        (None, "no model at"),
    ):
        given.unlink(missing_ok=True)
        if content is not None:
            given.write_bytes(content)
        with pytest.raises(ModelError, match=words) as error:
            run(asked)
        assert error.value.exit_code == 4 and "given.onnx" in str(error.value)
    assert not (tmp_path / "student.onnx").exists()


def test_a_student_of_another_teacher_is_refused_unless_a_file_says_how_it_is_meant(tmp_path: Path) -> None:
    stranger = read_proto(SAMPLES / "digits_vgg.onnx")
    random = np.random.default_rng(0)
    for tensor in stranger.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim > 1:
            array = random.standard_normal(array.shape) * array.std()
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))

    with pytest.raises(ModelError, match=r"given.onnx' does not look like a student of .*digits_vgg.onnx") as error:
        run(job(tmp_path, "vgg", stranger))
    assert "xdonnx match" in str(error.value)


def met_after_a_change(shown: dict[str, np.ndarray], factor: float) -> list[Meeting]:
    """Return all meetings of digits_residual with itself, the student's first weight multiplied on the way."""
    net = read_net(read_proto(SAMPLES / "digits_residual.onnx"))
    given = read_net(cut(net, Patch()))
    cpu, seen = torch.device("cpu"), []
    pairs = {pair.student[-1]: pair for pair in pairs_of(net, given, shown).pairs}

    def visit(meeting: Meeting) -> Weights | None:
        seen.append(meeting)
        return (factor * meeting.weight, meeting.bias) if len(seen) == 1 else None

    meet((net, convert(net, cpu)), (given, convert(given, cpu)), pairs, shown, visit, {}, ignore)
    return seen


def test_the_last_layer_of_a_branch_makes_up_for_what_its_shortcut_lacks(shown: dict[str, np.ndarray]) -> None:
    """A visit that changes one layer before a block sees at the block's end what the other branch lacks by then."""
    seen = met_after_a_change(shown, 0.9)

    ends = [meeting for meeting in seen if meeting.beside is not None]
    assert ends and not any(meeting.beside for meeting in seen[:2]) and len(ends) < len(seen)
    for meeting in ends:
        theirs, ours = (torch.cat(list(side)) for side in meeting.beside or ())
        assert theirs.shape == ours.shape == torch.cat(list(meeting.target)).shape and not torch.equal(theirs, ours)
        lacks = torch.cat(list(meeting.whole_target())) - torch.cat(list(meeting.target))
        torch.testing.assert_close(lacks, theirs - ours, rtol=1e-3, atol=1e-4)


def test_a_branch_that_is_like_none_of_the_teachers_is_made_up_for_by_nobody(shown: dict[str, np.ndarray]) -> None:
    seen = met_after_a_change(shown, -3)

    assert seen[2].beside is None


@pytest.mark.parametrize("order", ["c = %s  t = Add (b, c)  s = Add (a, t)", "c = %s  t = Add (a, c)  s = Add (t, b)"])
def test_branches_that_are_added_in_another_order_are_not_taken_for_each_other(order: str) -> None:
    text = """
g (float[N,3,8,8] image, float[8,3,3,3] w, float[8,8,3,3] wa, float[8,8,3,3] wb, float[8,8,3,3] wc)
  => (float[N,8,8,8] y) {
  c0 = Conv <pads = [1,1,1,1]> (image, w)
  r0 = Relu (c0)
  a = Conv <pads = [1,1,1,1]> (r0, wa)
  b = Conv <pads = [1,1,1,1]> (r0, wb)
  %s
  y = Relu (s)
}"""
    third = "Conv <pads = [1,1,1,1]> (r0, wc)"
    model = nets.from_text(text % f"t = Add (a, b)  c = {third}  s = Add (t, c)")
    net, given = read_net(model), read_net(nets.from_text(text % (order % third)))
    cpu, seen = torch.device("cpu"), []
    shown = nets.samples(model, rows=20)
    pairs = {pair.student[-1]: pair for pair in pairs_of(net, given, shown).pairs}

    meet((net, convert(net, cpu)), (given, convert(given, cpu)), pairs, shown, seen.append, {}, ignore)
    same: list[Meeting] = []
    meet((net, convert(net, cpu)), (net, convert(net, cpu)), pairs, shown, same.append, {}, ignore)

    assert [meeting.layer.name for meeting in seen] == ["c0", "a", "b", "c"]
    assert not any(meeting.beside for meeting in seen if meeting.layer.name in ("a", "b", "c"))
    assert [meeting.layer.name for meeting in same if meeting.beside] == ["b", "c"]  # made after what is added


def test_zeros_of_a_layer_too_wide_for_a_system_stay_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossing, "WIDEST", 100)
    made = halved(read_net(read_proto(SAMPLES / "digits_vgg.onnx")))
    random, zeros = np.random.default_rng(0), {}
    for tensor in made.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim == 4:
            array = array * (random.random(array.shape) > 0.3)
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
            zeros[tensor.name] = array == 0

    run(job(tmp_path, "vgg", made))

    refitted = {t.name: numpy_helper.to_array(t) for t in read_proto(tmp_path / "student.onnx").graph.initializer}
    assert any(zero[0].size > 100 for zero in zeros.values())
    assert all(not refitted[name][zero].any() for name, zero in zeros.items())


def test_a_mixture_on_top_makes_errors_smaller_and_is_left_out_where_one_connection_is_asked_for(
    tmp_path: Path,
) -> None:
    net = read_net(read_proto(SAMPLES / "digits_residual.onnx"))
    given, errors = halved(net), []
    for at, options in enumerate(({}, {"connection": "soft", "alpha": 0.9, "beta": 0.5, "ridge": 0.01})):
        folder = tmp_path / str(at)
        folder.mkdir()
        report = run(job(folder, "residual", given, views=0, **options))
        assert report.fidelity
        errors.append(report.fidelity.outputs[0].relative_l2)
    assert errors[0] < errors[1]


def test_the_teacher_itself_is_no_student(tmp_path: Path) -> None:
    its = job(tmp_path, "vgg", read_proto(SAMPLES / "digits_vgg.onnx"))
    twin = tmp_path / "twin.onnx"
    twin.write_bytes((SAMPLES / "digits_vgg.onnx").read_bytes())
    with pytest.raises(NothingToDo, match="is the teacher"):
        run(its.model_copy(update={"student": twin}))


def test_zeros_of_a_thinned_student_stay_and_are_stored_sparsely(tmp_path: Path) -> None:
    teacher = SAMPLES / "digits_vgg.onnx"
    thin = tmp_path / "thin.onnx"
    shared: dict[str, Any] = {"shots": (str(SAMPLES / "shots"),), "holdout": str(SAMPLES / "held_out.npz")}
    shared |= {"preprocess": Preprocess("unit"), "model": teacher, "per_class": 4}
    made = run(Job(out=thin, method=("l1-norm",), structure="element", keep=0.1, **shared))

    report = run(Job(out=tmp_path / "refitted.onnx", student=thin, preset_effort="fast", **shared))

    assert made.student and report.student and made.fidelity and report.fidelity
    assert report.student.nonzero <= 1.01 * made.student.nonzero and report.student.bytes <= 1.01 * made.student.bytes
    assert (report.fidelity.accuracy_student or 0) > (made.fidelity.accuracy_student or 0)
    with pytest.raises(JobError, match="fills zeros"):
        run(Job(out=tmp_path / "mixed.onnx", student=thin, method=("fskd",), **shared))


def test_a_graph_of_a_large_fixed_batch_is_matched_on_whole_batches() -> None:
    net = read_net(read_proto(SAMPLES / "digits_vgg.onnx"))
    fixed = onnx.ModelProto()
    fixed.CopyFrom(net.source)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 100
    large = read_net(fixed)
    images = np.random.default_rng(0).random((200, *net.shapes[net.interface.inputs[0].name][1:]), np.float32)
    found = match(
        side(large, {net.interface.inputs[0].name: images}), side(large, {net.interface.inputs[0].name: images})
    )
    assert len(found.pairs) == len(net.layers)


def test_an_answer_before_a_rectifier_is_no_matter_of_the_rectifier_alone() -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(read_net(read_proto(SAMPLES / "digits_vgg.onnx")).source)
    net = read_net(proto)
    first = next(name for name, after in wired(net).after.items() if after == {"Relu"})
    proto.graph.output.append(onnx.ValueInfoProto(name=first))
    proto = onnx.shape_inference.infer_shapes(proto)
    exposed = onnx.helper.make_tensor_value_info(first, onnx.TensorProto.FLOAT, [None, *net.shapes[first][1:]])
    proto.graph.output[-1].CopyFrom(exposed)
    assert wired(read_net(proto)).after[first] == {"Relu", "#out"}


def test_what_a_file_says_is_warned_of_where_it_looks_wrong(tmp_path: Path) -> None:
    teacher = SAMPLES / "digits_vgg.onnx"
    net = read_net(read_proto(teacher))
    onnx.save(halved(net), tmp_path / "given.onnx")
    digits = np.load(SAMPLES / "held_out.npz")["images"][:20].astype(np.float32) / 255
    port = net.interface.inputs[0]
    inputs = {port.name: digits.reshape(len(digits), *(int(size) for size in port.shape[1:]))}
    files = (teacher, tmp_path / "given.onnx")
    found = matched(files, net, inputs, {})
    hashes = (fingerprint(files[0]), fingerprint(files[1]))
    text = written(found.matching, (net, found.net), hashes, ("t", "s", "match.toml"))
    first, second = (pair for pair in found.matching.pairs if len(net.layers[pair.teacher].out_ids) == 48)
    rows = [f'student = ["{pair.student[0]}"]' for pair in (first, second)]
    swapped = text.replace(rows[0], "@").replace(rows[1], rows[0]).replace("@", rows[1])
    heard: dict[str, list[str]] = {}
    for name, edited in (("swapped", swapped), ("without", text.replace(rows[0], "student = []"))):
        path = tmp_path / f"{name}.toml"
        path.write_text(edited)
        events: list[Event] = []
        matched(files, net, inputs, {}, by=path, log=events.append)
        heard[name] = [event.text for event in events if event.level == "warning"]

    for pair in (first, second):
        where = f"stands in '{tmp_path / 'swapped.toml'}' with '{pair.teacher}' at a confidence of 0."
        assert any(where in text for text in heard["swapped"])
    why = f"is matched with none in '{tmp_path / 'without.toml'}': left as it is."
    assert heard["without"][0] == f"'{first.student[0]}' of the student {why}"
