"""Answers compared run by run equal answers compared all at once, by numpy, from the definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from onnx import TensorProto, helper, parser

from xdonnx.errors import ModelError, ShotsError, VerifyError
from xdonnx.fidelity import compare, kinds
from xdonnx.intervals import smallest_drop, tango, wilson
from xdonnx.runtime import answer, open_session

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


@pytest.fixture
def measure(tmp_path: Path):
    """Save both models and compare them; returns the fidelity and what was warned of."""

    def measured(teacher: onnx.ModelProto, student: onnx.ModelProto, shots: tiny.Shots, seed: int = 0, **how):
        events = []
        found = compare(
            tiny.saved(teacher, tmp_path / "teacher.onnx"),
            tiny.saved(student, tmp_path / "student.onnx"),
            shots,
            generator=np.random.default_rng(seed),
            log=events.append,
            **how,
        )
        return found, [event.text for event in events if event.level == "warning"]

    return measured


def logits(proto: onnx.ModelProto, shots: tiny.Shots) -> np.ndarray:
    return answer(open_session(proto), shots.inputs)["logits"].astype(np.float64)


def test_a_teacher_agrees_with_itself_in_everything(measure) -> None:
    found, warnings = measure(tiny.classifier(), tiny.classifier(), tiny.images(20))
    assert found.top1_agreement == 100 and found.drop.value == 0
    assert found.accuracy_teacher is None and found.accuracy_student is None
    (output,) = found.outputs
    assert (output.name, output.relative_l2, output.low, output.high, output.max_abs) == ("logits", 0, 0, 0, 0)
    assert output.cosine == pytest.approx(1)
    assert warnings == []


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 150])
def test_figures_are_those_of_all_answers_at_once(measure, count: int) -> None:
    teacher, student, shots = tiny.classifier(), tiny.classifier(noise=0.4), tiny.images(count)
    t, s = logits(teacher, shots), logits(student, shots)

    found, _ = measure(teacher, student, shots)

    (output,) = found.outputs
    assert found.samples == count
    assert output.relative_l2 == pytest.approx(np.linalg.norm(s - t) / np.linalg.norm(t), rel=1e-5)
    assert output.max_abs == pytest.approx(np.abs(s - t).max(), rel=1e-4)
    assert output.cosine == pytest.approx(np.sum(s * t) / np.linalg.norm(s) / np.linalg.norm(t), rel=1e-6)
    if count == 1:  # one sample bounds nothing
        assert output.low is output.high is None and output.confidence == 0.95
    else:
        assert output.low <= output.relative_l2 * (1 + 1e-12) and output.relative_l2 <= output.high * (1 + 1e-12)
    agreeing = int(np.sum(s.argmax(1) == t.argmax(1)))
    assert found.top1_agreement == pytest.approx(100 * agreeing / count)
    expected = wilson(count - agreeing, count)
    assert (found.drop.of, found.drop.value, found.drop.high) == ("agreement", expected.value, expected.high)


def test_with_labels_the_drop_is_that_of_the_accuracy(measure) -> None:
    teacher, student, shots = tiny.classifier(), tiny.classifier(noise=0.8), tiny.images(90)
    labels = logits(teacher, shots).argmax(1)
    labels[::3] = np.random.default_rng(5).integers(0, 5, 30)
    t, s = logits(teacher, shots).argmax(1) == labels, logits(student, shots).argmax(1) == labels

    found, _ = measure(teacher, student, tiny.Shots(shots.inputs, labels), confidence=0.9)

    assert found.accuracy_teacher == pytest.approx(100 * t.mean())
    assert found.accuracy_student == pytest.approx(100 * s.mean())
    lost, gained = int(np.sum(t & ~s)), int(np.sum(s & ~t))
    assert lost > 0 and gained > 0
    expected = tango(lost, gained, 90, 0.9)
    drop = found.drop
    assert (drop.of, drop.lost, drop.gained, drop.confidence) == ("accuracy", lost, gained, 0.9)
    assert (drop.value, drop.low, drop.high) == (expected.value, expected.low, expected.high)
    assert found.smallest_drop == smallest_drop(90, 0.9)


def test_the_same_seed_gives_the_same_interval(measure) -> None:
    pair = tiny.classifier(), tiny.classifier(noise=0.3), tiny.images(30)
    (one, _), (same, _), (other, _) = (measure(*pair, seed=seed) for seed in (4, 4, 5))
    assert one == same
    assert one.outputs[0].high != other.outputs[0].high


@pytest.mark.parametrize("labels", [[0, 1, 5], [0, -1, 2]])
def test_labels_beyond_the_classes_are_refused(measure, labels: list[int]) -> None:
    shots = tiny.images(3, labels=np.array(labels))
    with pytest.raises(ShotsError, match="labels run from"):
        measure(tiny.classifier(), tiny.classifier(), shots)


def test_a_fixed_batch_is_filled_and_the_rest_left_out_with_a_warning(measure) -> None:
    text = tiny.CLASSIFIER.replace("[N,", "[4,")
    free, shots = tiny.classifier(noise=0.3), tiny.images(11)

    found, warnings = measure(tiny.classifier(text=text), tiny.classifier(noise=0.3, text=text), shots)

    assert found.samples == 8
    assert warnings == ["3 of 11 samples are left out: too few for a batch of 4"]
    t, s = logits(tiny.classifier(), shots)[:8], logits(free, shots)[:8]
    assert found.outputs[0].relative_l2 == pytest.approx(np.linalg.norm(s - t) / np.linalg.norm(t), rel=1e-5)


def test_too_few_samples_for_a_fixed_batch_are_refused(measure) -> None:
    fixed = tiny.classifier(text=tiny.CLASSIFIER.replace("[N,", "[4,"))
    with pytest.raises(ShotsError, match="takes 4 samples at once, there are 3"):
        measure(fixed, fixed, tiny.images(3))


def test_no_samples_are_refused(measure) -> None:
    with pytest.raises(ShotsError, match="there are 0"):
        measure(tiny.classifier(), tiny.classifier(), tiny.images(0))


def test_samples_for_other_inputs_are_refused(measure) -> None:
    shots = tiny.Shots({"picture": tiny.images(3).inputs["image"]})
    with pytest.raises(ShotsError, match=r"takes \['image'\], the shots hold \['picture'\]"):
        measure(tiny.classifier(), tiny.classifier(), shots)


def test_inputs_that_fix_different_first_axes_are_no_batch(measure) -> None:
    proto = parser.parse_model(f"{HEAD} g (float[1,4] x, float[2,4] state) => (float[2,4] y) {{ y = Add (x, state) }}")
    inputs = {name: np.ones((4, 4), np.float32) for name in ("x", "state")}
    with pytest.raises(ModelError, match="no batch"):
        measure(proto, proto, tiny.Shots(inputs))


def test_a_batch_that_is_free_only_in_name_is_fed_sample_by_sample(measure) -> None:
    # The graph flattens everything into one row, so two samples at once would be one answer of ten classes.
    text = tiny.CLASSIFIER.replace("logits = Gemm <transB = 1> (f, w2, b2)", "").replace(
        "f = Flatten (p)",
        "g = Flatten (p)  l = Gemm <transB = 1> (g, w2, b2)  one = Constant <value = int64[2] {1, -1}> ()"
        "  logits = Reshape (l, one)",
    )
    shots = tiny.images(9)

    found, _ = measure(tiny.classifier(text=text), tiny.classifier(text=text, noise=0.5), shots)

    s, t = logits(tiny.classifier(noise=0.5), shots), logits(tiny.classifier(), shots)
    assert found.samples == 9
    assert found.top1_agreement == pytest.approx(100 * np.mean(s.argmax(1) == t.argmax(1)))


def test_answers_that_are_not_finite_where_the_teachers_are_fail(measure) -> None:
    student = tiny.classifier()
    bias = next(tensor for tensor in student.graph.initializer if tensor.name == "b2")
    bias.raw_data = np.array([0, np.nan, 0, np.inf, 0], np.float32).tobytes()
    with pytest.raises(VerifyError, match=r"output 'logits' has 8 numbers that are not finite"):
        measure(tiny.classifier(), student, tiny.images(4))


def test_what_is_not_finite_in_the_teacher_itself_is_left_out_with_a_warning(measure) -> None:
    text = f"{HEAD} g (float[N,3] image) => (float[N,3] y) {{ a = Log (image)  y = Add (a, w) }}"
    teacher = tiny.with_weights(text, {"w": np.zeros(3, np.float32)})
    student = tiny.with_weights(text, {"w": np.array([0.1, 0, 0], np.float32)})
    image = np.exp([[1, 2, 3], [2, 1, 0]]).astype(np.float32)
    image[0, 2] = 0

    found, warnings = measure(teacher, student, tiny.Shots({"image": image}))

    assert found.outputs[0].relative_l2 == pytest.approx(np.sqrt(0.02 / (1 + 4 + 4 + 1)), rel=1e-5)
    assert warnings == ["output 'y': 1 of 6 numbers left out, not finite in the teacher itself"]


def test_another_shape_of_the_answer_fails(measure) -> None:
    wide = tiny.random_weights(0, tiny.SHAPES | {"w2": (6, 8), "b2": (6,)})
    student = tiny.with_weights(tiny.CLASSIFIER.replace("float[N,5]", "float[N,6]"), wide)
    with pytest.raises(VerifyError, match=r"has shape \(3, 6\), the teacher's has \(3, 5\)"):
        measure(tiny.classifier(), student, tiny.images(3))


def test_outputs_of_whole_numbers_are_compared_by_agreement_and_the_first_of_scores_classifies(measure) -> None:
    text = f"""{HEAD} g (float[N,4] image) => (int64[N] winner, float[N] top, float[N,3,1,1] scores, float[N,3] more) {{
      more = MatMul (image, w)
      axes = Constant <value = int64[2] {{2, 3}}> ()
      scores = Unsqueeze (more, axes)
      winner = ArgMax <axis = 1, keepdims = 0> (more)
      top = ReduceMax <axes = [1], keepdims = 0> (more)
    }}"""
    weights = [tiny.random_weights(seed, {"w": (4, 3)}) for seed in (0, 1)]
    teacher, student = (tiny.with_weights(text, weight) for weight in weights)
    image = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)

    found, _ = measure(teacher, student, tiny.Shots({"image": image}))

    t, s = (image @ weight["w"] for weight in weights)
    share = 100 * float(np.mean(t.argmax(1) == s.argmax(1)))
    assert 0 < share < 100
    winner, top, scores, more = found.outputs
    assert (winner.name, winner.relative_l2, winner.max_abs) == ("winner", None, None)
    assert winner.agreement == pytest.approx(share) and found.top1_agreement == pytest.approx(share)
    assert top.relative_l2 == pytest.approx(np.linalg.norm(s.max(1) - t.max(1)) / np.linalg.norm(t.max(1)), rel=1e-5)
    assert scores.relative_l2 == more.relative_l2 and scores.agreement is None


def test_of_several_outputs_of_scores_labels_choose_the_first_that_has_their_classes(measure, tmp_path: Path) -> None:
    text = tiny.CLASSIFIER.replace("(float[N,5] logits)", "(float[N,2] place, float[N,5] logits)")
    text = text.replace("  logits =", "  place = Gemm <transB = 1> (f, w3, b3)\n  logits =")
    shapes = tiny.SHAPES | {"w3": (2, 8), "b3": (2,)}
    proto = tiny.with_weights(text, tiny.random_weights(shapes=shapes))
    labels = np.arange(40) % 5

    plain, _ = measure(proto, proto, tiny.images(40))
    labelled, _ = measure(proto, proto, tiny.images(40, labels=labels))
    pair, _ = measure(proto, proto, tiny.images(40, labels=labels % 2))

    assert (plain.classifier, labelled.classifier, pair.classifier) == ("place", "logits", "place")
    session = open_session(tiny.saved(proto, tmp_path / "two.onnx"))
    scores = answer(session, tiny.images(40).inputs)["logits"]
    assert labelled.accuracy_teacher == pytest.approx(100 * np.mean(scores.argmax(1) == labels))
    assert kinds(session, tiny.images(40, labels=labels)).classes == 5
    with pytest.raises(ShotsError, match="without labels"):
        measure(proto, proto, tiny.images(40, labels=labels + 4))


@pytest.mark.parametrize(
    ("end", "probable"),
    [("", False), ("Softmax <axis = 1>", True), ("LogSoftmax <axis = 1>", True), ("Sigmoid", False)],
)
def test_the_scores_are_counted_and_probabilities_among_them_known(measure, end: str, probable: bool) -> None:
    step = f"y = {end} (more)" if end else "y = Identity (more)"
    text = f"""{HEAD} g (float[N,4] image) => (float[N,3] y) {{
      more = MatMul (image, w)
      {step}
    }}"""
    proto = tiny.with_weights(text, tiny.random_weights(0, {"w": (4, 3)}))
    image = np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32)
    found, _ = measure(proto, proto, tiny.Shots({"image": image}))
    assert (found.classifier, found.classes, found.probable) == ("y", 3, probable)


def test_a_model_that_does_not_classify_has_no_top1_figures(measure) -> None:
    proto = tiny.with_weights(
        f"{HEAD} g (float[N,3,6,6] image) => (float[N,8,4,4] y) {{ y = Conv (image, w1, b1) }}",
        {name: values for name, values in tiny.random_weights().items() if name in ("w1", "b1")},
    )
    found, _ = measure(proto, proto, tiny.images(5, labels=np.arange(5)))
    assert found.top1_agreement is None and found.drop is None and found.smallest_drop is None
    assert found.outputs[0].relative_l2 == 0


def test_one_score_a_sample_is_no_classifier(measure) -> None:
    text = f"{HEAD} g (float[N,4] image) => (float[N,1] y) {{ y = MatMul (image, w) }}"
    proto = tiny.with_weights(text, {"w": np.ones((4, 1), np.float32)})
    found, _ = measure(proto, proto, tiny.Shots({"image": np.ones((3, 4), np.float32)}))
    assert found.top1_agreement is None and found.drop is None


DETECTOR = f"""{HEAD} g (float[N,4] image) => (int64[M,2] places, float[M] scores, float[N,4] y) {{
  y = Add (image, w)
  high = Greater (y, zero)
  found = NonZero (high)
  places = Transpose <perm = [1,0]> (found)
  scores = GatherND (y, places)
}}"""


def detector(shift: float) -> onnx.ModelProto:
    """Return what finds the numbers above zero, all of them moved by so much."""
    return tiny.with_weights(DETECTOR, {"w": np.full(4, shift, np.float32), "zero": np.zeros((), np.float32)})


def test_a_student_that_finds_more_or_fewer_than_the_teacher_has_no_bounded_error(measure) -> None:
    """It passed --max-error, even where it detected nothing at all."""
    image = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)

    found, warnings = measure(detector(0.0), detector(0.5), tiny.Shots({"image": image}))

    places, scores, y = found.outputs
    runs = [(row > 0).sum() != (row + 0.5 > 0).sum() for row in image]
    assert 0 < sum(runs) < 6
    assert (scores.relative_l2, scores.max_abs, scores.compared) == (None, None, False)
    # Of whole numbers those count as unequal that have no counterpart.
    same = 2 * sum((row > 0).sum() for row, other in zip(image, runs, strict=True) if not other)
    most = 2 * sum((row + 0.5 > 0).sum() for row in image)
    assert (places.relative_l2, places.agreement) == (None, pytest.approx(100 * same / most)) and places.compared
    assert y.relative_l2 == pytest.approx(0.5 * np.sqrt(24) / np.linalg.norm(image), rel=1e-5) and y.compared
    text = f"the student's has another length than the teacher's in {sum(runs)} of 6 runs"
    assert warnings == [f"output '{name}': {text}" for name in ("places", "scores")]
    # They are the worst samples there are.
    assert {shot.row for shot in found.worst if shot.relative_l2 is None} == set(np.flatnonzero(runs))


def test_outputs_whose_length_depends_on_the_data_are_compared_where_it_is_the_same(measure) -> None:
    image = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    image[np.abs(image) < 0.1] = 0.3

    found, warnings = measure(detector(0.0), detector(0.05), tiny.Shots({"image": image}))

    high = image[image > 0]
    assert found.outputs[1].relative_l2 == pytest.approx(0.05 * np.sqrt(len(high)) / np.linalg.norm(high), rel=1e-4)
    assert found.outputs[0].agreement == 100 and all(output.compared for output in found.outputs) and not warnings


def test_what_is_no_tensor_is_named_and_not_compared(measure) -> None:
    ports = "(float[N,4] image) => (seq(float[N,4]) all, float[N,4] y)"
    text = f"{HEAD} g {ports} {{ y = Add (image, w) all = SequenceConstruct (y) }}"
    proto = tiny.with_weights(text, {"w": np.zeros(4, np.float32)})
    found, warnings = measure(proto, proto, tiny.Shots({"image": np.ones((3, 4), np.float32)}))
    assert [output.compared for output in found.outputs] == [False, True]
    assert warnings == ["output 'all' is not compared: it is no tensor"]


@pytest.mark.parametrize("one", [False, True])
def test_a_teacher_near_chance_has_no_accuracy_to_lose_so_agreement_is_judged(measure, one: bool) -> None:
    """Its drop of accuracy was 0, and so any student passed: the folder above the images was taken for a class."""
    teacher, student, shots = tiny.classifier(), tiny.classifier(noise=1.5), tiny.images(60)
    t, s = (logits(model, shots).argmax(1) for model in (teacher, student))
    labels = np.full(60, np.bincount(t, minlength=5).argmin()) if one else (t + 1) % 5

    found, warnings = measure(teacher, student, tiny.Shots(shots.inputs, labels))

    assert found.accuracy_teacher == pytest.approx(100 * np.mean(t == labels)) and found.accuracy_teacher < 20
    assert (found.drop.of, found.drop.lost, found.drop.gained) == ("agreement", np.sum(t != s), 0)
    assert found.drop.value == pytest.approx(100 * np.mean(t != s))
    choices = 5 if one else len(np.unique(labels))
    assert [f"near chance for {choices} classes, so its agreement" in text for text in warnings] == [True]


def test_an_error_against_a_teacher_of_zeros_has_no_relative_size(measure) -> None:
    text = f"{HEAD} g (float[N,3] image) => (float[N,3] y) {{ y = Mul (image, w) }}"
    teacher, student = (tiny.with_weights(text, {"w": np.full(3, factor, np.float32)}) for factor in (0.0, 1.0))
    shots = tiny.Shots({"image": np.ones((4, 3), np.float32)})
    found, _ = measure(teacher, student, shots)
    output = found.outputs[0]
    assert (output.relative_l2, output.high, output.max_abs, output.cosine) == (None, None, 1.0, None)
    same, _ = measure(teacher, teacher, shots)
    assert same.outputs[0].relative_l2 == 0


def test_half_precision_answers_are_compared_in_full(measure) -> None:
    proto = parser.parse_model(f"{HEAD} g (float16[N,2] image) => (float16[N,2] y) {{ y = Add (image, w) }}")
    weight = helper.make_tensor("w", TensorProto.FLOAT16, [2], [0.0, 0.0])
    proto.graph.initializer.append(weight)
    # The square of 60,000 is beyond float16.
    image = np.full((3, 2), 60_000, np.float16)
    found, _ = measure(proto, proto, tiny.Shots({"image": image}))
    assert found.outputs[0].relative_l2 == 0 and found.outputs[0].cosine == pytest.approx(1)


def test_progress_is_told_to_the_end(tmp_path: Path) -> None:
    path, events = tiny.saved(tiny.classifier(), tmp_path / "a.onnx"), []
    compare(path, path, tiny.images(100), generator=np.random.default_rng(0), log=events.append)
    assert [(event.stage, event.done, event.total) for event in events] == [("verify", 64, 100), ("verify", 100, 100)]
