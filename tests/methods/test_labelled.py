"""The baselines that train end to end: `bp` on labels, `fitnet` on hints and softened answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
import torch

from xdonnx.budget import Budget, Plan, make_plan
from xdonnx.convert import convert
from xdonnx.errors import JobError, ShotsError
from xdonnx.events import Event
from xdonnx.graph import Net, read_net
from xdonnx.images import Preprocess
from xdonnx.job import Job, run
from xdonnx.methods import fitnet, training
from xdonnx.methods.bench import Bench, Outcome
from xdonnx.methods.bp import BP
from xdonnx.methods.fitnet import TEMPERATURE, FitNet
from xdonnx.methods.l1_norm import L1Norm
from xdonnx.methods.training import Batch
from xdonnx.patch import Patch, cut
from xdonnx.runtime import answer, open_session
from xdonnx.shots import Shots

SAMPLES = Path(__file__).parents[2] / "samples"
CLASSIFIER = """
g (float[N,4,8,8] image, float[12,4,3,3] w1, float[12] b1, float[12,12,3,3] w2, float[12] b2, float[12,12,3,3] w3,
   float[12] b3, float[5,12] w4, float[5] b4) => (float[N,5] answers) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
  r1 = Relu (c1)
  p1 = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r1)
  c2 = Conv <pads = [1,1,1,1]> (p1, w2, b2)
  r2 = Relu (c2)
  p2 = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r2)
  c3 = Conv <pads = [1,1,1,1]> (p2, w3, b3)
  r3 = Relu (c3)
  p3 = GlobalAveragePool (r3)
  f = Flatten (p3)
  answers = Gemm <transB = 1> (f, w4, b4)
}"""


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every processor compute in 32 bits."""
    monkeypatch.setattr(training, "_cpu_has_bfloat16", lambda: False)


def classifier(*, squashed: bool = False) -> Net:
    text = CLASSIFIER
    if squashed:
        text = text.replace("answers = Gemm", "scores = Gemm").replace("}", "  answers = Softmax (scores)\n}")
    return read_net(nets.from_text(text))


def shots_of(net: Net, rows: int = 40, *, labels: bool = True) -> Shots:
    """Return random samples; the labels are what the sign of two means says, so they can be learnt."""
    inputs = nets.samples(net.source, rows)
    means = inputs["image"].mean((2, 3))
    found = (means[:, 0] > 0) * 2 + (means[:, 1] > 0)
    return Shots(inputs, found.astype(np.int64) if labels else None, tuple(map(str, range(rows))))


def applied(
    method: Any, net: Net, shots: Shots, patch: Patch | None = None, plan: Plan | None = None, log: Any = None
) -> Outcome:
    bench = Bench(convert(net, torch.device("cpu")), torch.Generator().manual_seed(0), log or (lambda event: None))
    found: Outcome = method(net, patch or Patch(), shots, plan or make_plan(net, Budget("keep", 0.5)), bench)
    return found


def values(model: onnx.ModelProto, inputs: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Return a value from inside a graph as onnxruntime computes it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if name not in {value.name for value in copy.graph.output}:
        copy.graph.output.append(onnx.ValueInfoProto(name=name))
    return answer(open_session(copy), inputs, [name])[name]


def cross_entropy(net: Net, patch: Patch, shots: Shots, name: str = "answers") -> float:
    """Return the mean of -log of the share of the right class, by hand."""
    scores = values(cut(net, patch), shots.inputs, name).astype(np.float64)
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert shots.labels is not None
    return float(-np.log(shares[np.arange(len(shots)), shots.labels]).mean())


# ----------------------------------------------------------------------------------------------------------------- bp


@pytest.mark.parametrize("squashed", [False, True])
def test_bp_lowers_the_cross_entropy_of_the_shots(squashed: bool) -> None:
    net = classifier(squashed=squashed)
    shots, scores = shots_of(net), "scores" if squashed else "answers"
    bare = applied(L1Norm(), net, shots).patch

    made = applied(BP(steps=60), net, shots).patch

    assert made.drop == bare.drop
    assert cross_entropy(net, made, shots, scores) < 0.9 * cross_entropy(net, bare, shots, scores)


def test_bp_reports_the_cross_entropy_of_its_judges() -> None:
    net, events = classifier(), []
    shots = shots_of(net)
    patch = applied(L1Norm(), net, shots).patch

    applied(BP(steps=40), net, shots, patch, log=events.append)

    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).numpy()
    judges = shots.take(order[: round(training.JUDGES * 40)])
    assert f"held-out loss {cross_entropy(net, patch, judges):.4g} ->" in events[-1].text


def test_bp_removes_nothing_more_after_another_method() -> None:
    net = classifier()
    shots = shots_of(net)
    first = net.groups[0]
    patch = Patch({}, frozenset(int(label) for label in first.ids[:3]))

    made = applied(BP(steps=60), net, shots, patch).patch

    assert made.drop == patch.drop
    assert cross_entropy(net, made, shots) < cross_entropy(net, patch, shots)


@pytest.mark.parametrize("structure", ["element", "2:4"])
def test_bp_keeps_single_zeros(structure: str) -> None:
    net = classifier()
    plan = make_plan(net, Budget("keep", 0.5, structure))
    bare = applied(L1Norm(), net, shots_of(net), plan=plan).patch

    made = applied(BP(steps=40), net, shots_of(net), plan=plan).patch

    assert bare.tensors and not made.drop
    for name, array in bare.tensors.items():
        np.testing.assert_array_equal(made.tensors[name] != 0, array != 0)
        assert (made.tensors[name] != array).any()


def test_bp_refuses_labels_that_the_model_has_no_class_for() -> None:
    net = classifier()
    shots = shots_of(net)
    assert shots.labels is not None
    shots.labels[3] = 5

    with pytest.raises(ShotsError, match=r"(?s)label 5 is none of the model's 5 classes.*labels"):
        applied(BP(steps=5), net, shots)


@pytest.mark.parametrize("name", ["plain", "volume"])
def test_bp_refuses_a_model_that_does_not_score_classes(name: str) -> None:
    net = read_net(nets.build(name))
    inputs = nets.samples(net.source, 8)
    shots = Shots(inputs, np.zeros(8, np.int64), tuple(map(str, range(8))))

    with pytest.raises(JobError, match=r"(?s)no row of scores.*--method cross --method tune"):
        applied(BP(steps=5), net, shots)


def job(folder: Path, *method: str, **options: Any) -> Job:
    wanted: dict[str, Any] = {
        "model": SAMPLES / "digits_mobile.onnx",
        "out": folder / "student.onnx",
        "force": True,
        "shots": (str(SAMPLES / "shots"),),
        "holdout": str(SAMPLES / "held_out.npz"),
        "preprocess": Preprocess(preset="unit"),
        "device": "cpu",
        "method": method,
        "keep": 0.5,
        "steps": 40,
    }
    return Job(**(wanted | options))


def unlabelled(folder: Path) -> Path:
    with np.load(SAMPLES / "held_out.npz") as held:
        np.savez(folder / "bare.npz", images=held["images"][:60])
    return folder / "bare.npz"


def test_bp_refuses_unlabelled_shots_and_says_how_to_label_them(tmp_path: Path) -> None:
    with pytest.raises(ShotsError, match=r"(?s)learns from labels, .* have none\.\n  Pass --labels FILE, or folders"):
        run(job(tmp_path, "bp", shots=(str(unlabelled(tmp_path)),), holdout="0.2"))
    assert not (tmp_path / "student.onnx").exists()


@pytest.mark.parametrize("method", [("bp",), ("cross", "bp")])
def test_bp_refuses_unlabelled_shots_before_any_work(method: tuple[str, ...], tmp_path: Path) -> None:
    events: list[Event] = []

    with pytest.raises(ShotsError, match="learns from labels, and the samples have none"):
        run(job(tmp_path, *method, keep=None, shots=(str(unlabelled(tmp_path)),), holdout="0.2"), events.append)

    assert {event.stage for event in events} <= {"read", "shots"}


# ------------------------------------------------------------------------------------------------------------- fitnet


def gap(net: Net, patch: Patch, shots: Shots, name: str) -> float:
    """Return the error of a value against the teacher's, by onnxruntime, for the channels that stay."""
    teacher, student = (values(model, shots.inputs, name) for model in (net.source, cut(net, patch)))
    if name in net.tracks:
        stays = [at for at, label in enumerate(net.tracks[name].ids) if int(label) not in patch.drop]
        teacher = np.take(teacher, stays, net.tracks[name].axis)
    return float(np.square(student - teacher).sum() / np.square(teacher).sum())


def divergence(net: Net, patch: Patch, shots: Shots) -> float:
    """Return the divergence of the softened answers, by hand."""
    shares = []
    for model in (net.source, cut(net, patch)):
        scores = values(model, shots.inputs, "answers").astype(np.float64) / TEMPERATURE
        shares.append(np.exp(scores) / np.exp(scores).sum(1, keepdims=True))
    teacher, student = shares
    return float((teacher * np.log(teacher / student)).sum(1).mean()) * TEMPERATURE**2


def staged(net: Net, shots: Shots, monkeypatch: pytest.MonkeyPatch, log: Any = None) -> list[Patch]:
    """Return the student before, between and after the stages."""
    patches: list[Patch] = []
    whole = fitnet.train

    def noted(net: Net, patch: Patch, *rest: Any) -> Outcome:
        found = whole(net, patch, *rest)
        patches.extend([found.patch] if patches else [patch, found.patch])
        return found

    monkeypatch.setattr(fitnet, "train", noted)
    last = applied(FitNet(steps=120), net, shots, log=log).patch
    assert last is patches[-1]
    return patches


def test_fitnet_first_learns_the_middle_and_then_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    net = classifier()
    shots = shots_of(net, 60, labels=False)

    start, hinted, made = staged(net, shots, monkeypatch)

    assert gap(net, hinted, shots, "r2") < 0.9 * gap(net, start, shots, "r2")
    for name in ("w3", "b3", "w4", "b4"):  # they come after the hint
        np.testing.assert_array_equal(hinted.tensors[name], net.array(name))
    assert divergence(net, made, shots) < 0.9 * divergence(net, hinted, shots)
    assert start.drop == hinted.drop == made.drop == applied(L1Norm(), net, shots).patch.drop


def test_fitnet_reports_the_divergence_of_its_judges_after_the_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    net, events = classifier(), []
    shots = shots_of(net, 60)
    _, hinted, _ = staged(net, shots, monkeypatch, log=events.append)

    generator = torch.Generator().manual_seed(0)
    _, order = (torch.randperm(60, generator=generator).numpy() for _ in range(2))  # one draw for each stage
    judges = shots.take(order[: round(training.JUDGES * 60)])

    texts = [event.text for event in events if event.stage == "tune" and "->" in event.text]
    assert len(texts) == 2
    assert f"loss {divergence(net, hinted, judges):.4g} ->" in texts[1]


def test_fitnet_spends_half_the_steps_on_each_stage() -> None:
    net, events = classifier(), []

    applied(FitNet(steps=20), net, shots_of(net), log=events.append)

    ticks = [event for event in events if event.stage == "tune" and event.total]
    assert [(event.done, event.total) for event in ticks] == [(at, 10) for at in range(1, 11)] * 2


def test_fitnet_reads_no_labels() -> None:
    """That there are any says that answers are scores; which ones there are says nothing."""
    net = classifier()
    shots = shots_of(net)
    others = Shots(shots.inputs, shots.labels[::-1].copy(), shots.ids)

    first, second = (applied(FitNet(steps=10), net, given).patch for given in (shots, others))

    assert first.tensors.keys() == second.tensors.keys()
    for name, array in first.tensors.items():
        np.testing.assert_array_equal(second.tensors[name], array)


def test_fitnet_moves_answers_that_are_no_scores_to_those_of_the_teacher() -> None:
    """Softened, answers that are all too large by the same would be right."""
    net = classifier()
    patch = Patch({"b4": net.array("b4") + 3})

    made = applied(FitNet(steps=120), net, shots_of(net, 60, labels=False), patch).patch

    assert gap(net, made, shots_of(net, 60), "answers") < 0.5 * gap(net, patch, shots_of(net, 60), "answers")


def test_fitnet_removes_nothing_more_after_another_method() -> None:
    net = classifier()
    patch = Patch({}, frozenset(int(label) for label in net.groups[1].ids[:4]))

    made = applied(FitNet(steps=60), net, shots_of(net), patch).patch

    assert made.drop == patch.drop
    assert divergence(net, made, shots_of(net)) < divergence(net, patch, shots_of(net))


@pytest.mark.parametrize("name", ["plain", "concat", "volume"])
def test_fitnet_fits_answers_that_are_no_classes(name: str) -> None:
    net = read_net(nets.build(name))
    inputs = nets.samples(net.source, 30)
    shots = Shots(inputs, None, tuple(map(str, range(30))))
    bare = applied(L1Norm(), net, shots).patch

    made = applied(FitNet(steps=60), net, shots).patch

    assert gap(net, made, shots, "out") < 0.9 * gap(net, bare, shots, "out")


def test_softened_answers_are_compared_by_their_divergence() -> None:
    teacher = torch.tensor([[4.0, 0.0, -4.0], [0.0, 8.0, 0.0]])
    student = torch.tensor([[0.0, 4.0, 4.0], [0.0, 8.0, 0.0]])

    found = float(fitnet._softened(Batch({"scores": teacher}, {"scores": student}, None)))

    expected = 0.0
    for wanted, seen in zip(teacher.tolist(), student.tolist(), strict=True):
        p, q = ([math.exp(x / TEMPERATURE) for x in row] for row in (wanted, seen))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 2
    assert found == pytest.approx(TEMPERATURE**2 * expected, rel=1e-5)
    one = torch.tensor([[2.0], [0.0]])
    assert float(fitnet._softened(Batch({"price": one}, {"price": one + 1}, None))) == pytest.approx(2 / 4)


@pytest.mark.parametrize("method", ["bp", "fitnet"])
def test_training_wins_back_much_of_what_removal_costs_on_digits(method: str, tmp_path: Path) -> None:
    bare, made = (
        run(job(tmp_path, name, model=SAMPLES / "digits_residual.onnx", steps=steps))
        for name, steps in (("l1-norm", None), (method, 40))
    )

    assert bare.student and made.student and bare.fidelity and made.fidelity
    assert made.student.macs == bare.student.macs
    before, after = bare.fidelity.top1_agreement, made.fidelity.top1_agreement
    assert before is not None and after is not None and after > before + 5
