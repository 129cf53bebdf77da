"""`squeeze`: attention that cannot collapse, an adversary that can do no harm, and whole jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loops import FIXED, LONG, TWO_ANSWERS, TWO_INPUTS, gap, halved, net_of, same, shots_of, trained
from test_tune import job
from torch import Tensor

from xdonnx.convert import convert
from xdonnx.errors import JobError
from xdonnx.events import Event
from xdonnx.graph import Net
from xdonnx.job import run
from xdonnx.methods import adversary, squeeze, training
from xdonnx.methods.adversary import STRONG, Adversary
from xdonnx.methods.attention import Attention, attention, of_student, squeezed
from xdonnx.methods.squeeze import Lambdas, Squeezing, levels
from xdonnx.methods.training import Batch, relative_error
from xdonnx.methods.tune import matching
from xdonnx.model import fingerprint
from xdonnx.patch import Patch
from xdonnx.student import Student, find_taps

CPU = torch.device("cpu")
WIDTHS = (3, 5)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every processor compute in 32 bits, so that what is compared is the method."""
    monkeypatch.setattr(training, "_cpu_has_bfloat16", lambda: False)


def randomness(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def maps(seed: int = 0, rows: int = 4) -> list[Tensor]:
    return [
        torch.randn(rows, p, width, generator=randomness(seed + p)) for width, p in zip(WIDTHS, (16, 9), strict=True)
    ]


def scales(found: list[Tensor]) -> list[Tensor]:
    return [features.square().mean().sqrt() for features in found]


# ------------------------------------------------------------------------------------------------------------ attention


def by_hand(weights: Attention, found: list[Tensor], row: int) -> list[np.ndarray]:
    """Return the vectors of one sample, by loops over levels and positions."""
    fine, coarse = (features[row].numpy().T for features in found)
    (k0, k1), (q0, q1), (s0, s1) = (
        [t.numpy() for t in part] for part in (weights.keys, weights.queries, weights.scores)
    )
    unit = [float(scale) for scale in scales(found)]
    summary = weights.summary.numpy() @ coarse.mean(1) / unit[1]

    def seen(features: np.ndarray, key: np.ndarray, query: np.ndarray, score: np.ndarray, scale: float) -> np.ndarray:
        weight = np.array([np.exp(score @ np.maximum(key @ column / scale + query, 0)) for column in features.T])
        return sum(w * column for w, column in zip(weight / weight.sum(), features.T, strict=True))

    upper = seen(coarse, k1, q1 @ summary, s1, unit[1])
    return [seen(fine, k0, q0 @ np.concatenate([summary, upper / unit[1]]), s0, unit[0]), upper]


def test_vectors_are_those_of_loops_over_positions() -> None:
    found = maps()
    weights = attention(WIDTHS, randomness(), CPU)

    vectors = squeezed(weights, found, scales(found))

    for row in range(4):
        for vector, hand in zip(vectors, by_hand(weights, found, row), strict=True):
            assert np.allclose(vector[row].numpy(), hand, atol=1e-5)


@pytest.mark.parametrize("what", ["summary", "level above"])
def test_what_was_seen_coarsely_decides_where_to_look_more_finely(what: str) -> None:
    """A score that is linear in key plus query would not: the softmax cancels what all positions have in common."""
    found = maps()
    weights = attention(WIDTHS, randomness(), CPU)
    before = squeezed(weights, found, scales(found))[0]
    if what == "summary":
        weights.summary.zero_()
    else:
        weights.scores[1].mul_(-9)  # the level above looks elsewhere

    after = squeezed(weights, found, scales(found))[0]

    assert float((after - before).abs().max()) > 1e-3


def test_a_student_that_lost_nothing_begins_with_the_vectors_of_its_teacher_and_a_cut_one_with_its_own_channels() -> (
    None
):
    found = maps()
    teacher = attention(WIDTHS, randomness(), CPU)
    vectors = squeezed(teacher, found, scales(found))

    whole = of_student(teacher, [torch.arange(width) for width in WIDTHS])
    assert all(torch.allclose(a, b) for a, b in zip(squeezed(whole, found, scales(found)), vectors, strict=True))

    picks = [torch.tensor([0, 2]), torch.tensor([1, 3, 4])]
    left = [features[:, :, pick] for features, pick in zip(found, picks, strict=True)]
    for vector, pick, width in zip(
        squeezed(of_student(teacher, picks), left, scales(found)), picks, WIDTHS, strict=True
    ):
        gone = sorted(set(range(width)) - set(pick.tolist()))
        assert vector.shape == (4, width)
        assert not vector[:, gone].any() and vector[:, pick].abs().min() > 0


# ---------------------------------------------------------------------------------------------------------- no collapse


def learned(net: Net, patch: Patch, *, steps: int = 100, vectors: float = 100.0) -> tuple[Squeezing, Patch]:
    """Return a lesson after its run, with a comparison that outweighs all else."""
    taps = find_taps(net, convert(net, CPU))
    lesson = Squeezing(levels(net, taps), taps.answers, Lambdas(1.0, vectors, 0.3))
    return lesson, trained(net, patch, shots_of(net, 60), lesson, steps=steps, judge=matching)


def test_the_comparison_moves_the_student_and_never_the_teachers_attention() -> None:
    net = net_of("plain")
    lesson, _ = learned(net, halved(net), steps=2)
    batch = shown(net, lesson)
    lesson.step = 10**6
    assert lesson.parts is not None

    def gradients() -> list[Tensor]:
        assert lesson.parts is not None
        for tensor in lesson.parts.teacher.parameters():
            tensor.grad = None
        lesson(batch).backward()
        return [tensor.grad.clone() for tensor in lesson.parts.teacher.parameters() if tensor.grad is not None]

    with_all = gradients()
    lesson.lambdas = Lambdas(0.0, 0.0, 0.0)
    of_the_task = gradients()

    assert of_the_task and any(float(g.norm()) > 0 for g in of_the_task)
    assert all(torch.equal(a, b) for a, b in zip(with_all, of_the_task, strict=True))


def shown(net: Net, lesson: Squeezing) -> Batch:
    """Return a batch as the loop shows it, of a student that is off by noise."""
    patch, seen = halved(net), list[Batch]()

    def spy(batch: Batch) -> Tensor:
        seen.append(batch)
        return matching(batch)

    trained(net, patch, shots_of(net, 60), spy, steps=1)
    batch = next(one for one in seen if any(value.requires_grad for value in one.student.values()))
    detached = {name: value.detach().requires_grad_() for name, value in batch.student.items()}
    return Batch(batch.teacher, detached, None, batch.whole)


def vectors_of(lesson: Squeezing, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Return the vectors of teacher and student."""
    assert lesson.parts is not None
    whole = [batch.whole[name].flatten(2).mT for name in lesson.levels]
    ours = [batch.student[name].flatten(2).mT for name in lesson.levels]
    with torch.no_grad():
        return (
            list(squeezed(lesson.parts.teacher, whole, scales(whole))),
            list(squeezed(lesson.parts.student, ours, scales(whole))),
        )


def test_saying_nothing_is_no_way_to_agree() -> None:
    """With the comparison weighed a hundredfold, the teacher's vectors still tell samples apart and are not small."""
    net = net_of("plain")
    lesson, _ = learned(net, halved(net))
    batch = shown(net, lesson)

    teacher, student = vectors_of(lesson, batch)

    for name, theirs, ours in zip(lesson.levels, teacher, student, strict=True):
        mean = batch.whole[name].flatten(2).mean(2)
        # Plain averages of the same features are larger, since attention leaves out what all samples share, but tell
        # samples hardly better apart.
        assert float(theirs.norm()) > 0.25 * float(mean.norm())
        assert float(theirs.std(0).norm()) > 0.8 * float(mean.std(0).norm())
        assert float(relative_error(ours, theirs)) < 0.5 < float(relative_error(0 * ours, theirs)) == 1


def test_attention_learns_what_the_teacher_answers() -> None:
    net = net_of("plain")
    taps = find_taps(net, convert(net, CPU))
    lesson = Squeezing(levels(net, taps), taps.answers, Lambdas(0.0, 0.0, 0.0), adversarial=False)
    told: list[float] = []

    class Heard:
        """Hands everything on, and notes what the heads err by."""

        def begin(self, student: Student, steps: int) -> None:
            lesson.begin(student, steps)

        def __call__(self, batch: Batch) -> Tensor:
            found = lesson(batch)
            told.append(float((found - matching(batch)).detach()))
            return found

        def after_step(self) -> None:
            lesson.after_step()

    trained(net, halved(net), shots_of(net, 60), Heard(), steps=100, judge=matching)

    assert np.mean(told[-10:]) < 0.5 * told[0]


# -------------------------------------------------------------------------------------------------------- the adversary


def rows(seed: int, shift: float = 0.0, many: int = 32) -> Tensor:
    return torch.randn(many, 6, generator=randomness(seed)) + shift


def taught(steps: int = 200, shift: float = 1.0, classes: int = 0) -> Adversary:
    found = Adversary(6, classes, randomness(), CPU)
    for step in range(steps):
        wanted = rows(step)
        found.learn(wanted, wanted + shift, wanted[:, :classes].argmax(1) if classes else None)
    return found


def test_the_adversary_tells_two_networks_apart_and_says_which_way_to_go() -> None:
    found = taught()

    with torch.no_grad():
        high, low = (found.verdict(rows(5000, shift))[0].mean() for shift in (0.0, 1.0))
    assert float(high) > float(low) + 0.5
    push = found.push(rows(5002, 1.0), None)
    assert push is not None
    # The student is too high everywhere: going down the gradient lowers it.
    assert (push.mean(0) > 0).all()


def test_the_adversary_learns_the_class_that_the_teacher_sees() -> None:
    found = taught(300, classes=3)

    seen = rows(5000, many=400)
    hits = found.verdict(seen)[1].argmax(1) == seen[:, :3].argmax(1)
    assert float(hits.float().mean()) > 0.8


def test_no_layer_of_the_adversary_stretches_what_it_reads() -> None:
    for weight in taught().weights:
        assert float(torch.linalg.matrix_norm(weight.detach(), 2)) <= 1 + 1e-4


def test_an_adversary_that_is_nearly_always_right_rests() -> None:
    strong, weak = taught(200, shift=8.0), taught(200, shift=0.0)

    assert strong.right > STRONG - 0.2 and strong.rests > 20
    assert weak.rests == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("when", ["push", "learn"])
def test_an_adversary_that_breaks_down_retires_without_a_word(value: float, when: str) -> None:
    found = taught(3)
    with torch.no_grad():
        found.weights[0].fill_(value)
        found.weights[2].fill_(value)

    if when == "learn":
        found.learn(rows(0), rows(1), None)
    found.push(rows(2), None)

    assert found.retired and found.push(rows(2), None) is None
    found.learn(rows(0), rows(1), None)


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give what makes every adversary's numbers something else after a few steps."""

    def as_(value: float) -> None:
        old = Adversary.learn

        def learn(self: Adversary, teacher: Tensor, student: Tensor, classes: Tensor | None) -> None:
            old(self, teacher, student, classes)
            self.steps = getattr(self, "steps", 0) + 1  # type: ignore[attr-defined]
            if self.steps > 5:  # type: ignore[attr-defined]
                with torch.no_grad():
                    for weight in self.weights:
                        weight.fill_(value)

        monkeypatch.setattr(Adversary, "learn", learn)

    yield as_


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e12])
def test_a_student_is_mended_whatever_becomes_of_its_adversary(breaking: Any, value: float) -> None:
    net, events = net_of("plain"), list[Event]()
    breaking(value)
    taps = find_taps(net, convert(net, CPU))
    lesson = Squeezing(levels(net, taps), taps.answers, Lambdas(), log=events.append)

    made = trained(net, halved(net), shots_of(net, 60), lesson, steps=40, judge=matching)

    assert gap(net, made) < 0.9 * gap(net, halved(net))
    warned = [event.text for event in events if event.level == "warning"]
    assert len(warned) <= 1 and (not warned or "adversary broke down" in warned[0])
    assert warned or np.isfinite(value), "who breaks down is told of"


def test_the_adversary_pulls_by_its_share_and_no_more() -> None:
    lesson = Squeezing({}, (), Lambdas(1.0, 0.5, 0.3))
    made, given = rows(0).requires_grad_(), rows(1)
    (pull,) = torch.autograd.grad(lesson._compared(made, given, [2, 4]), made)

    for size in (1e-9, 1.0, 1e9):
        (found,) = torch.autograd.grad(lesson._pushed(size * rows(2), made, given, [2, 4]), made)
        assert float(found.norm()) == pytest.approx(0.3 * float(pull.norm()), rel=1e-4)
        assert float(torch.cosine_similarity(found.flatten(), rows(2).flatten(), 0)) == pytest.approx(1, abs=1e-4)
    for useless in (None, 0 * rows(2)):
        assert float(lesson._pushed(useless, made, given, [2, 4])) == 0


# --------------------------------------------------------------------------------------------------------- on any model


def mended(net: Net, patch: Patch, *, steps: int = 60, **options: Any) -> Patch:
    taps = find_taps(net, convert(net, CPU))
    lesson = Squeezing(levels(net, taps), taps.answers, Lambdas(), seed=5, **options)
    return trained(net, patch, shots_of(net, 60), lesson, steps=steps, judge=matching)


@pytest.mark.parametrize("text", [TWO_INPUTS, TWO_ANSWERS, FIXED, LONG, "signal"])
def test_squeeze_mends_classifiers_and_models_that_are_none(text: str) -> None:
    net = net_of(text)
    patch = halved(net)

    made = mended(net, patch, steps=30 if text == FIXED else 60)

    assert made.drop == patch.drop
    # One of them errs little to begin with.
    assert gap(net, made) < (0.99 if text == FIXED else 0.9) * gap(net, patch)


def test_the_adversary_makes_a_difference_and_the_same_seed_none() -> None:
    net = net_of("plain")

    with_one, again, without = (
        mended(net, halved(net), steps=20, adversarial=adversarial) for adversarial in (True, True, False)
    )

    assert same(with_one, again) and not same(with_one, without)


def test_levels_are_the_last_maps_before_each_change_of_size_fine_to_coarse() -> None:
    net = net_of("plain")
    taps = find_taps(net, convert(net, CPU))

    found = levels(net, taps)

    assert list(found) == list(taps.stages)[-squeeze.MOST_LEVELS :]
    assert set(found.values()) == {1}


# ----------------------------------------------------------------------------------------------------------- whole jobs


def figures(report: Any) -> tuple[float, float]:
    assert report.fidelity and report.student
    return report.fidelity.outputs[0].relative_l2, report.student.nonzero


def test_squeeze_wins_back_what_zeros_cost_on_digits_and_leaves_them_with_and_without_an_adversary(
    tmp_path: Path,
) -> None:
    bare = run(job(tmp_path, "digits_residual", "l1-norm", steps=None, structure="element"))
    full = run(job(tmp_path, "digits_residual", "l1-norm", "squeeze", structure="element", steps=15))
    lone = run(job(tmp_path, "digits_residual", "l1-norm", "squeeze", structure="element", steps=15, adversarial=False))

    (before, weights), *after = map(figures, (bare, full, lone))
    assert all(error < 0.9 * before and left == weights for error, left in after)
    assert after[0] != after[1]


def test_cross_then_squeeze_is_closer_than_cross_and_repeats_to_the_byte(tmp_path: Path) -> None:
    cross = run(job(tmp_path, "digits_mobile", "cross", steps=None, preset_effort="fast", keep=0.3))
    prints = []
    for _ in range(2):
        both = run(job(tmp_path, "digits_mobile", "cross", "squeeze", preset_effort="fast", keep=0.3))
        prints.append(fingerprint(tmp_path / "cross-squeeze.onnx"))

    assert figures(both)[0] < figures(cross)[0]
    assert prints[0] == prints[1]


def test_squeeze_alone_is_refused_with_what_to_put_before_it(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"(?s)squeeze removes nothing.*--method cross --method squeeze"):
        run(job(tmp_path, "digits_mobile", "squeeze"))
    assert not list(tmp_path.iterdir())


def test_adversarial_is_no_option_of_another_method(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="--no-adversarial is no option of --method l1-norm or tune") as error:
        job(tmp_path, "digits_mobile", "l1-norm", "tune", adversarial=False).methods()
    assert error.value.exit_code == 2
    made = job(tmp_path, "digits_mobile", "l1-norm", "squeeze", adversarial=False).methods()
    assert made[1].adversarial is False
    assert adversary.STRONG < 1


def test_what_is_squeezed_is_told_once_and_so_is_that_nothing_can_be() -> None:
    for kept, words in ((2, "stages are squeezed into"), (0, "no stage to squeeze")):
        net, events = net_of("plain"), list[Event]()
        taps = find_taps(net, convert(net, CPU))
        found = dict(list(levels(net, taps).items())[:kept])
        lesson = Squeezing(found, taps.answers, Lambdas(), log=events.append)

        trained(net, halved(net), shots_of(net, 60), lesson, steps=3, rates=(0.01,), judge=matching)

        assert sum(words in event.text for event in events) == 1 == len(events)
