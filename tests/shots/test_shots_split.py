"""The shots that judge are never those that fit, whatever is drawn; and invented shots say that they are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdonnx.errors import JobError, ShotsError
from xdonnx.model import Port
from xdonnx.samples import synthetic
from xdonnx.shots import Shots, split


def make(labels=None, count=None, classes=None):
    """Return shots whose only value is their own place."""
    count = len(labels) if labels is not None else count
    return Shots(
        inputs={"x": np.arange(count, dtype=np.float32)[:, None]},
        labels=None if labels is None else np.array(labels, np.int64),
        ids=tuple(f"r{k}" for k in range(count)),
        classes=classes,
    )


def places(shots):
    return shots.inputs["x"][:, 0].astype(int).tolist()


def parts(shots, *, per_class=None, max_shots=None, holdout=0.2, seed=0):
    fit, held = split(shots, per_class=per_class, max_shots=max_shots, holdout=holdout, seed=seed)
    return places(fit), places(held)


def test_without_drawing_a_fifth_of_each_class_is_held_out():
    labels = [k % 3 for k in range(60)]

    fit, held = parts(make(labels))

    assert len(held) == 12 and sorted(fit + held) == list(range(60))
    assert np.bincount([labels[k] for k in held]).tolist() == [4, 4, 4]


def test_shares_that_do_not_divide_differ_by_less_than_one_from_proportion():
    labels = [0] * 31 + [1] * 13 + [2] * 6 + [3] * 2

    _, held = parts(make(labels), holdout=0.3)

    assert len(held) == round(0.3 * 52)
    quota = np.bincount(labels) * len(held) / 52
    assert (abs(np.bincount([labels[k] for k in held], minlength=4) - quota) < 1).all()


def test_drawing_per_class_fits_on_those_and_judges_on_others():
    labels = [k % 10 for k in range(200)]

    fit, held = parts(make(labels), per_class=3)

    assert np.bincount([labels[k] for k in fit]).tolist() == [3] * 10
    assert np.bincount([labels[k] for k in held]).tolist() == [4] * 10
    assert not set(fit) & set(held)


def test_the_hold_out_takes_at_most_the_rest():
    fit, held = parts(make(count=10), max_shots=9)

    assert len(fit) == 9 and len(held) == 1 and sorted(fit + held) == list(range(10))


@pytest.mark.parametrize("options", [{"per_class": 5}, {"max_shots": 10}, {"max_shots": 99}, {}])
def test_where_all_are_drawn_the_hold_out_comes_from_them(options):
    fit, held = parts(make([0] * 5 + [1] * 5), **options)

    assert len(held) == 2 and sorted(fit + held) == list(range(10))


def test_a_hold_out_of_its_own_leaves_every_drawn_shot_to_fit():
    other = make(count=3)

    fit, held = split(make(count=8), per_class=None, max_shots=None, holdout=other, seed=0)

    assert places(fit) == list(range(8)) and held is other


def test_a_hold_out_of_nothing_judges_on_the_shots_that_fit():
    fit, held = parts(make(count=8), max_shots=5, holdout=0.0)

    assert fit == held and len(fit) == 5


def test_the_seed_decides_the_draw():
    shots = make([k % 4 for k in range(80)])

    assert parts(shots, per_class=2, seed=1) == parts(shots, per_class=2, seed=1)
    assert len({tuple(parts(shots, per_class=2, seed=seed)[0]) for seed in range(5)}) == 5


@given(
    count=st.integers(2, 40),
    kinds=st.integers(0, 5),
    max_shots=st.none() | st.integers(1, 45),
    holdout=st.floats(0.01, 0.99),
    seed=st.integers(0, 3),
)
def test_both_parts_are_never_empty_never_overlap_and_keep_their_order(count, kinds, max_shots, holdout, seed):
    labels = None if kinds == 0 else [k * 7 % kinds for k in range(count)]

    fit, held = parts(make(labels, count), max_shots=max_shots, holdout=holdout, seed=seed)

    assert fit and held and not set(fit) & set(held)
    assert fit == sorted(fit) and held == sorted(held)
    # All that was drawn fits, unless the hold-out had to come from it.
    drawn = min(max_shots or count, count)
    assert len(fit) + (len(held) if drawn == count else 0) == drawn
    wanted = max(1, round(holdout * count))
    assert len(held) == min(wanted, count - drawn if drawn < count else count - 1)


@pytest.mark.parametrize(
    ("shots", "options", "message"),
    [
        (make(count=1), {}, "fewer shots than the hold-out needs: 1, "),
        (make([0, 0, 1]), {"per_class": 2}, "class 1 has 1 shots, --per-class asks for 2"),
        (make([0, 0, 1], classes=("cat", "dog")), {"per_class": 2}, "class 1 'dog' has 1 shots"),
        (make(count=9), {"per_class": 2}, "--per-class needs labels"),
        (make(count=9), {"holdout": make(count=0)}, "the shots to hold out are none"),
    ],
)
def test_too_few_shots_are_refused_with_the_numbers(shots, options, message):
    with pytest.raises(ShotsError, match=message):
        parts(shots, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_class": 2, "max_shots": 5}, "Give one of them"),
        ({"per_class": 0}, "--per-class 0 draws nothing"),
        ({"max_shots": -1}, "--max-shots -1 draws nothing"),
        ({"holdout": 1.0}, r"--holdout 1.0 is not a fraction"),
        ({"holdout": -0.1}, "not a fraction"),
        ({"holdout": float("nan")}, "not a fraction"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options, message):
    with pytest.raises(JobError, match=message):
        parts(make([0, 1] * 5), **options)


def test_synthetic_shots_are_standard_normal_and_named_so():
    ports = [Port("a", "float16", ("N", 3, 20, 20)), Port("b", "uint8", (1, 50))]

    shots = synthetic(ports, 4, np.random.default_rng(0))
    again = synthetic(ports, 4, np.random.default_rng(0))

    assert shots.ids == ("synthetic[0]", "synthetic[1]", "synthetic[2]", "synthetic[3]")
    assert shots.labels is None
    assert shots.inputs["a"].shape == (4, 3, 20, 20) and shots.inputs["a"].dtype == np.float16
    # 4,800 draws: the mean's standard error is 0.014, the deviation's 0.010.
    assert abs(shots.inputs["a"].mean(dtype=np.float64)) < 0.06
    assert abs(shots.inputs["a"].std(dtype=np.float64) - 1) < 0.04
    assert shots.inputs["b"].dtype == np.uint8 and len(np.unique(shots.inputs["b"])) > 50
    np.testing.assert_array_equal(again.inputs["a"], shots.inputs["a"])


@pytest.mark.parametrize(
    ("port", "message"),
    [
        (Port("x", "float32", ("N", 3, None, 8)), r"wants \(N, 3, \?, 8\)(.|\n)*--input-shape x:"),
        (Port("x", "float32", None), "any shape"),
        (Port("x", "int64", ("N", 8)), "int64, which cannot be invented"),
    ],
)
def test_inputs_that_cannot_be_invented_are_refused(port, message):
    with pytest.raises(ShotsError, match=message):
        synthetic([port], 2, np.random.default_rng(0))


def test_no_synthetic_shots_are_refused():
    with pytest.raises(JobError, match="at least 1"):
        synthetic([Port("x", "float32", ("N", 2))], 0, np.random.default_rng(0))
