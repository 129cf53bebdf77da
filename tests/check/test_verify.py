"""The whole comparison of two files, from their bytes to the exit code."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny
from onnx import TensorProto, helper, numpy_helper, parser

from xdonnx.cost import measure_cost
from xdonnx.errors import JobError, ModelError, ShotsError, VerifyError
from xdonnx.gate import Gate, rejudge
from xdonnx.intervals import tango
from xdonnx.publication import write_report
from xdonnx.report import read_report, schema
from xdonnx.runtime import answer, open_session
from xdonnx.verification import check_interface, latency, verify


@pytest.fixture
def judged(tmp_path: Path):
    """Save both models and verify them, by default without the latency."""

    def run(teacher: onnx.ModelProto, student: onnx.ModelProto, shots: tiny.Shots, gate: Gate | None = None, **how):
        paths = tiny.saved(teacher, tmp_path / "teacher.onnx"), tiny.saved(student, tmp_path / "student.onnx")
        return verify(*paths, shots, gate or Gate(), **{"seconds": 0.0} | how)

    return run


def labelled(count: int) -> tiny.Shots:
    """Return samples that the teacher of `tiny` classifies without a fault."""
    shots, session = tiny.images(count), ort.InferenceSession(tiny.classifier().SerializeToString())
    return tiny.Shots(shots.inputs, session.run(None, shots.inputs)[0].argmax(1))


def test_a_teacher_passes_against_itself(judged) -> None:
    gate = Gate(max_drop=0, max_error=0, min_shrink=0)

    report = judged(tiny.classifier(), tiny.classifier(), labelled(50), gate)

    assert (report.status, report.exit_code, report.reasons) == ("passed", 0, ())
    assert report.fidelity.top1_agreement == report.fidelity.accuracy_student == 100
    assert [gate.passed for gate in report.gates] == [True] * 3
    interface = report.interface
    assert (interface.inputs, interface.outputs, interface.opset, interface.metadata) == ("same",) * 4


def test_a_damaged_student_is_rejected_for_its_drop(judged) -> None:
    shots = labelled(80)

    report = judged(tiny.classifier(), tiny.classifier(noise=1.5), shots, Gate(max_drop=5))

    assert (report.status, report.exit_code) == ("rejected", 3)
    (gate,) = report.gates
    assert gate.value == pytest.approx(100 - report.fidelity.accuracy_student) and gate.value > 5
    assert report.reasons == (f"max_drop: {gate.value:.2f} points, allowed at most 5 points",)


def test_an_uncertain_drop_passes_by_its_value_and_not_by_its_bound(judged) -> None:
    shots = labelled(30)
    pair = tiny.classifier(), tiny.classifier(), shots
    assert judged(*pair, Gate(max_drop=5)).exit_code == 0
    assert judged(*pair, Gate(max_drop=5, confidence=0.95)).exit_code == 3


def test_the_report_survives_the_disk_and_keeps_its_schema(judged, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    job = {"keep": 0.5, "out": Path("x.onnx"), "method": ("cross",)}

    report = judged(tiny.classifier(), tiny.classifier(noise=0.1), labelled(20), Gate(max_drop=9), job=job, seconds=0.1)

    write_report(report, tmp_path / "report")
    assert read_report(tmp_path / "report") == report
    jsonschema.validate(json.loads((tmp_path / "report" / "report.json").read_text()), schema())
    assert report.job == {"keep": 0.5, "out": "x.onnx", "method": ["cross"]}


def test_the_same_seed_gives_the_same_report_but_for_time(judged) -> None:
    def once(seed: int):
        report = judged(tiny.classifier(), tiny.classifier(noise=0.3), tiny.images(30), seed=seed)
        return report.model_copy(update={"started": "", "seconds": 0.0})

    assert once(1) == once(1)
    assert once(1).fidelity != once(2).fidelity


def test_files_and_costs_are_those_on_disk(judged, tmp_path: Path) -> None:
    teacher, student = tiny.classifier(), tiny.classifier()
    student.graph.initializer[0].raw_data = bytes(len(student.graph.initializer[0].raw_data))

    report = judged(teacher, student, tiny.images(20), shots_path="some/where")

    for path, proto, file, cost in (
        (tmp_path / "teacher.onnx", teacher, report.files.teacher, report.teacher),
        (tmp_path / "student.onnx", student, report.files.student, report.student),
    ):
        assert file.path == str(path)
        assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert file.bytes == cost.bytes == path.stat().st_size
        measured = measure_cost(proto)
        assert (cost.params, cost.nonzero, cost.macs) == (measured.params, measured.nonzero, measured.macs)
    assert report.student.nonzero == report.teacher.nonzero - 8 * 27
    assert report.files.shots.path == "some/where" and report.files.shots.bytes == 20 * 3 * 36 * 4


def test_other_samples_or_labels_have_another_fingerprint(judged) -> None:
    one, other = tiny.images(20), tiny.images(20, seed=1)
    with_labels = tiny.Shots(one.inputs, np.zeros(20, np.int64))
    prints = {
        judged(tiny.classifier(), tiny.classifier(), shots).files.shots.sha256
        for shots in (one, tiny.images(20), other, with_labels)
    }
    assert len(prints) == 3


def test_macs_of_a_graph_of_free_size_are_those_of_one_sample(judged) -> None:
    free = tiny.classifier(text=tiny.CLASSIFIER.replace("[N,3,6,6]", "[N,3,H,W]"))
    assert judged(free, free, tiny.images(20)).student.macs == measure_cost(tiny.classifier()).macs
    report = judged(free, free, tiny.images(20), shapes={"image": (1, 3, 12, 12)})
    assert report.student.macs == measure_cost(free, {"image": (1, 3, 12, 12)}).macs


def test_nodes_without_a_known_shape_are_named_in_a_warning(judged) -> None:
    text = tiny.CLASSIFIER.replace(
        "logits = Gemm <transB = 1> (f, w2, b2)",
        "n = NonZero (image)  k = Cast <to = 1> (n)  t = Transpose (k)  q = MatMul (k, t)  "
        "logits = Gemm <transB = 1> (f, w2, b2)",
    )
    proto = tiny.classifier(text=text)
    assert any(
        "MACs of the student leave out 1 nodes of unknown shape: 'q'" in warning
        for warning in judged(proto, proto, tiny.images(5)).warnings
    )


def rename_input(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "picture"


def fix_batch(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def double_output(proto: onnx.ModelProto) -> None:
    proto.graph.node[-1].output[0] = "single"
    proto.graph.node.append(helper.make_node("Cast", ["single"], ["logits"], to=TensorProto.DOUBLE))
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def newer_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 18


def other_metadata(proto: onnx.ModelProto) -> None:
    proto.metadata_props[0].value = "someone else"


@pytest.mark.parametrize(
    ("change", "section", "words", "compared"),
    [
        (rename_input, "inputs", "input 'picture", False),
        (fix_batch, "inputs", "[1, 3, 6, 6]", False),
        (double_output, "outputs", "output 'logits float64", False),
        (newer_opset, "opset", "opset {'': 18}", True),
        (other_metadata, "metadata", "metadata 'author'", True),
    ],
)
def test_another_interface_fails_and_is_named_in_its_section(judged, change, section, words, compared) -> None:
    student = tiny.classifier()
    change(student)

    report = judged(tiny.classifier(), student, tiny.images(20), Gate(max_drop=100))

    assert (report.status, report.exit_code) == ("failed", 6)
    found = report.interface.model_dump()
    (line,) = found.pop(section)
    assert words in line and report.reasons == (line,)
    assert set(found.values()) == {"same"}
    # Answers are compared where callers of the teacher could still ask for them.
    assert (report.fidelity is not None) == compared
    with pytest.raises(VerifyError) as error:
        check_interface(tiny.classifier(), student)
    assert line in str(error.value)


def test_our_own_metadata_keeps_the_interface() -> None:
    student = tiny.classifier()
    student.metadata_props.add(key="xdonnx.method", value="cross")
    check_interface(tiny.classifier(), student)


def test_answers_that_are_no_numbers_fail_the_job_with_a_report(judged) -> None:
    student = tiny.classifier()
    student.graph.initializer[3].raw_data = np.full(5, np.nan, np.float32).tobytes()
    report = judged(tiny.classifier(), student, tiny.images(20), Gate(max_drop=100))
    assert (report.status, report.exit_code, report.fidelity, report.gates) == ("failed", 6, None, ())
    assert "not finite" in report.reasons[0]


def test_few_samples_are_said_to_prove_little(judged) -> None:
    def warnings(count: int, gate: Gate, **how) -> tuple[str, ...]:
        return judged(tiny.classifier(), tiny.classifier(), tiny.images(count), gate, **how).warnings

    assert warnings(50, Gate(max_drop=2)) == (
        "50 held-out samples cannot tell a drop below 10.00 points from none (95 % confidence)",
    )
    assert warnings(50, Gate(max_drop=2, confidence=0.8))[0].endswith("4.00 points from none (80 % confidence)")
    assert warnings(3, Gate()) == ("3 held-out samples cannot tell any drop from none (95 % confidence)",)
    assert warnings(50, Gate(max_drop=10)) == ()
    # Where no limit says how fine the answer has to be, only what is coarse is worth a warning.
    assert warnings(99, Gate()) == (
        "99 held-out samples cannot tell a drop below 5.05 points from none (95 % confidence)",
    )
    assert warnings(100, Gate()) == ()


def test_a_student_at_chance_level_is_the_first_of_the_warnings_unless_a_limit_says_so(judged) -> None:
    shots = labelled(60)
    ruined = tiny.classifier(noise=30.0)

    report = judged(tiny.classifier(), ruined, shots, held_out=False)

    drop = report.fidelity.drop
    assert report.status == "passed" and drop.low > 5
    assert report.warnings[0] == (
        f"the student lost {drop.value:.2f} points of accuracy, at least {drop.low:.1f} (95 % confidence), and no "
        "limit was set: --max-drop 1 rejects such a student; remove less, or give more samples; the most accurate is "
        "--method cross --preset-effort best"
    )
    assert not [line for line in judged(tiny.classifier(), ruined, shots, Gate(max_drop=99)).warnings if "lost" in line]
    assert not [line for line in judged(tiny.classifier(), tiny.classifier(), shots).warnings if "lost" in line]


def test_a_perfect_student_that_too_few_samples_prove_is_told_how_many_would_do(judged) -> None:
    report = judged(tiny.classifier(), tiny.classifier(), labelled(100), Gate(max_drop=1, confidence=0.95))

    (reason,) = report.reasons
    assert reason.startswith("max_drop: 0.00 points (may be 3.94 points), allowed at most 1 points: 100 samples can")
    assert reason.endswith("promise 3.9 points at best; about 500 that come out alike would do")
    assert tango(0, 0, 500).high <= 1 < tango(0, 0, 400).high
    assert rejudge(report, Gate(max_drop=1, confidence=0.95)).reasons == report.reasons
    # What is lost for certain, more samples bring back as little as a limit of none at all.
    lost = judged(tiny.classifier(), tiny.classifier(noise=1.5), labelled(80), Gate(max_drop=1, confidence=0.95))
    assert "can promise" not in lost.reasons[0]


def test_judging_on_the_samples_that_fitted_is_a_warning(judged) -> None:
    report = judged(tiny.classifier(), tiny.classifier(), tiny.images(500), held_out=False)
    assert not report.fidelity.held_out
    assert report.warnings == ("the samples that judge are those that fitted (hold-out 0): new ones will do worse",)


def test_a_sparse_student_is_smaller_on_disk_and_said_to_be_no_faster(judged) -> None:
    teacher, student = tiny.classifier(), tiny.classifier()
    for proto, sparse in ((teacher, False), (student, True)):
        tensor = proto.graph.initializer[0]
        dense = numpy_helper.to_array(tensor).copy()
        dense[1:] = 0
        proto.graph.initializer.remove(tensor)
        if sparse:
            values = numpy_helper.from_array(dense[dense != 0], "w1")
            places = numpy_helper.from_array(np.flatnonzero(dense), "w1_places")
            proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, dense.shape))
        else:
            proto.graph.initializer.append(numpy_helper.from_array(dense, "w1"))

    report = judged(teacher, student, tiny.images(500))

    assert report.exit_code == 0 and report.fidelity.outputs[0].relative_l2 == pytest.approx(0, abs=1e-6)
    assert report.student.bytes < report.teacher.bytes
    assert report.student.params == report.teacher.params and report.student.nonzero == report.teacher.nonzero
    assert [text for text in report.warnings if "sparse" in text] == [
        "the student has sparse initializers, which onnxruntime makes dense on loading: "
        "the file is smaller, not the latency"
    ]


def test_warnings_reach_both_the_log_and_the_report(judged) -> None:
    events = []
    report = judged(tiny.classifier(), tiny.classifier(), tiny.images(5), log=events.append)
    assert report.warnings == tuple(event.text for event in events if event.level == "warning") != ()


def test_a_gate_on_what_the_model_does_not_do_is_refused(judged) -> None:
    proto = tiny.with_weights(
        '<ir_version: 8, opset_import: ["" : 17]> '
        "g (float[N,3,6,6] image) => (float[N,3,6,6] y) { y = Mul (image, w) }",
        {"w": np.ones(1, np.float32)},
    )
    with pytest.raises(JobError, match="no output classifies"):
        judged(proto, proto, tiny.images(5), Gate(max_drop=1))
    with pytest.raises(JobError, match="no latency was measured"):
        judged(proto, proto, tiny.images(5), Gate(max_latency_ratio=1))


def test_files_and_samples_that_do_not_fit_end_the_job(judged, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model at"):
        verify(tmp_path / "a.onnx", tmp_path / "b.onnx", tiny.images(5), Gate())
    with pytest.raises(ShotsError, match="the shots hold"):
        judged(tiny.classifier(), tiny.classifier(), tiny.Shots({"x": np.ones((3, 2), np.float32)}))


def test_latencies_are_measured_for_both_and_judged(judged) -> None:
    report = judged(
        tiny.classifier(), tiny.classifier(), tiny.images(20), Gate(max_latency_ratio=1000), seconds=0.2, threads=1
    )
    for cost in (report.teacher, report.student):
        speed = cost.latency_ms
        assert 0 < speed.q1 <= speed.median <= speed.q3 < 1000
        assert (speed.provider, speed.threads, speed.batch) == ("CPUExecutionProvider", 1, 1)
        assert 7 <= speed.runs <= 200
    ratio = report.student.latency_ms.median / report.teacher.latency_ms.median
    assert report.gates[0].value == pytest.approx(ratio) and report.exit_code == 0


def test_a_fixed_batch_is_timed_whole(judged) -> None:
    fixed = tiny.classifier(text=tiny.CLASSIFIER.replace("[N,", "[4,"))
    report = judged(fixed, fixed, tiny.images(9), seconds=0.05)
    assert report.student.latency_ms.batch == 4
    assert report.student.macs == 4 * measure_cost(tiny.classifier()).macs


def test_models_are_timed_in_turns_and_within_their_time(tmp_path: Path, monkeypatch) -> None:
    order = []

    class Slow:
        def __init__(self, name: str, delay: float) -> None:
            self.name, self.delay = name, delay

        def get_outputs(self) -> list:
            return []

        def get_providers(self) -> list[str]:
            return ["Test"]

        def run(self, names, feed) -> list:
            order.append(self.name)
            time.sleep(self.delay)
            return []

    sessions = {"a": Slow("a", 0.004), "b": Slow("b", 0.012)}
    monkeypatch.setattr("xdonnx.verification.open_session", lambda model, **how: sessions[model])
    feed = {"x": np.ones((2, 1))}

    start = time.perf_counter()
    a, b = latency(["a", "b"], [feed, feed], seconds=0.3, repeats=1000)

    assert time.perf_counter() - start < 5
    assert order == ["a", "b"] * (len(order) // 2)
    assert a.runs == b.runs < len(order) // 2 < 50
    assert 4 <= a.median < b.median and b.median >= 12
    assert a.batch == 2
    assert a.ratio is None and 1 < b.ratio.low <= b.ratio.value <= b.ratio.high and b.ratio.confidence > 0.95


def test_however_slow_seven_runs_are_timed_and_no_more_than_asked_for(tmp_path: Path) -> None:
    path = tiny.saved(tiny.classifier(), tmp_path / "a.onnx")
    feed = {name: values[:1] for name, values in tiny.images(1).inputs.items()}
    assert latency([path], [feed], seconds=0.0)[0].runs == 7
    assert latency([path], [feed], repeats=7, seconds=10)[0].runs == 7


def test_a_gpu_that_onnxruntime_did_not_use_is_a_warning(judged, monkeypatch) -> None:
    monkeypatch.setattr("xdonnx.runtime.providers", lambda device="cpu": ["CPUExecutionProvider"])
    report = judged(tiny.classifier(), tiny.classifier(), tiny.images(500), device="cuda:0", seconds=0.05)
    assert report.warnings == ("cuda:0 was asked for, but onnxruntime ran on CPUExecutionProvider",)
    assert report.student.latency_ms.provider == "CPUExecutionProvider"


def test_verifying_costs_no_torch() -> None:
    names = ["intervals", "cost", "report", "gate", "fidelity", "verification", "model", "runtime"]
    program = ";".join(f"import xdonnx.{name}" for name in names)
    program += ";import sys; print([name for name in sys.modules if name.split('.')[0] in ('torch', 'onnx2torch')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_labels_of_one_class_are_warned_of(judged) -> None:
    shots = tiny.images(60)
    winners = answer(open_session(tiny.classifier()), shots.inputs)["logits"].argmax(1)
    most = np.bincount(winners).argmax()
    rows = np.flatnonzero(winners == most)
    inputs = {name: values[rows] for name, values in shots.inputs.items()}

    report = judged(tiny.classifier(), tiny.classifier(), tiny.Shots(inputs, winners[rows]))

    assert report.fidelity.accuracy_teacher == 100 and report.fidelity.drop.of == "accuracy"
    assert [f"all of {len(rows)} held-out samples have the same label" in text for text in report.warnings] == [
        False,
        True,
    ]
    assert not [text for text in judged(tiny.classifier(), tiny.classifier(), labelled(500)).warnings]


def test_few_samples_are_said_to_tell_little_of_an_error(judged) -> None:
    gate = Gate(max_error=100, confidence=0.9)
    (bounded,) = (
        text
        for text in judged(tiny.classifier(), tiny.classifier(noise=0.3), tiny.images(9), gate).warnings
        if "error" in text
    )
    assert bounded.startswith("the error on others is hardly known from 9 held-out samples: it may be ")
    assert bounded.endswith(" (90 % confidence)")
    report = judged(tiny.classifier(), tiny.classifier(noise=0.3), tiny.images(1), gate)
    assert "hardly known from 1 held-out sample: nothing bounds it" in report.warnings[-1]
    assert (report.exit_code, report.gates[0].bound) == (3, None)
    many = judged(tiny.classifier(), tiny.classifier(noise=0.3), tiny.images(10), gate)
    assert not [text for text in many.warnings if "error" in text]


def test_what_no_answer_shows_is_told_before_anything_is_measured(judged, monkeypatch) -> None:
    monkeypatch.setattr("xdonnx.verification.compare", lambda *_, **__: pytest.fail("measured"))
    labels = np.array([0] * 19 + [5])
    with pytest.raises(ShotsError, match="labels run from 0 to 5"):
        judged(tiny.classifier(), tiny.classifier(), tiny.images(20, labels=labels))
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,3,6,6] image) => (int64[N,6,6] y) {'
    proto = parser.parse_model(text + " y = ArgMax <axis = 1, keepdims = 0> (image) }")
    for gate, says in ((Gate(max_drop=1), "no output classifies"), (Gate(max_error=1), "no output of floating")):
        with pytest.raises(JobError, match=says):
            judged(proto, proto, tiny.images(20), gate)


def test_a_teacher_near_chance_is_warned_of(judged) -> None:
    shots = tiny.images(60)
    (logits,) = answer(open_session(tiny.classifier()), shots.inputs).values()
    right = logits.reshape(60, -1).argmax(1)
    classes = logits.reshape(60, -1).shape[1]

    def warnings(labels: np.ndarray) -> str:
        report = judged(tiny.classifier(), tiny.classifier(), tiny.images(60, labels=labels), Gate())
        return "\n".join(report.warnings)

    assert "near chance" not in warnings(right)
    assert f"near chance for {len(np.unique((right + 1) % classes))} classes" in warnings((right + 1) % classes)
