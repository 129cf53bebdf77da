"""Folds against moments of all rows, and the choice against least squares on the rows of the folds."""

import numpy as np
import pytest
import torch

from xdonnx.columns import Geometry, to_matrix
from xdonnx.connection import correction, cross, imitation, regression, restricted, soft
from xdonnx.crossval import choose, measure_folds, total
from xdonnx.moments import measure, measure_missing

LINEAR = Geometry("linear")
CASES = {
    "plain": dict(),
    "grouped": dict(groups=2, strides=(2, 1)),
    "transposed": dict(op="conv_transpose", strides=(2, 2)),
    "linear": dict(op="linear", kernel=(), size=()),
    "linear on sequences": dict(op="linear", kernel=(), size=(3,)),
}


def branch(shape, seed):
    """The other branch of a block in the two networks."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(shape, generator=generator, dtype=torch.float64)
    return whole, whole + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)


def rows_of(seed, n, d=6, o=4, noise=0.5):
    """Inputs of a linear layer in teacher and student, and its weights with the bias as last column, in numpy."""
    random = np.random.default_rng(seed)
    x_t = random.standard_normal((n, d)) @ random.standard_normal((d, d)) + 0.5
    x_s = 0.8 * x_t + noise * random.standard_normal((n, d))
    return x_t, x_s, random.standard_normal((o, d + 1))


def folds_of(x_t, x_s, beside=None, samples=0, folds=3):
    t, s = torch.tensor(x_t), torch.tensor(x_s)
    other = None if beside is None else tuple([torch.tensor(b)] for b in beside)
    return measure_folds([t], [s], other, LINEAR, bias=True, rows=len(t), samples=samples or len(t), folds=folds)


def errors_by_hand(x_t, x_s, weight, candidates, mask, columns, fold, beside=None):
    """Squared error on the rows of each fold of the weights that the other rows give, summed over folds.

    Ridges are further rows of numpy's least squares, output by output.
    """
    x_t, x_s = (np.concatenate([x, np.ones((len(x), 1))], 1) for x in (x_t, x_s))
    lacks = 0.0 * (x_t @ weight.T) if beside is None else beside[0] - beside[1]
    found = np.zeros(len(candidates))
    for held in np.unique(fold):
        seen, unseen = fold != held, fold == held
        for at, (connection, ridge) in enumerate(candidates):
            ((_, (a_t, a_s), (b_t, b_s)),) = connection.terms
            design = b_t * x_t[seen] + b_s * x_s[seen]
            target = (a_t * x_t[seen] + a_s * x_s[seen]) @ weight.T + (a_t - b_t) * lacks[seen]
            pull = np.full(design.shape[1], ridge * (design[:, :-1] ** 2).mean())
            pull[-1] *= 1e-6
            made = np.zeros_like(weight)
            for row, own in enumerate(weight):
                there = mask[row] & columns
                root = np.diag(np.sqrt(pull[there] * len(design)))
                system = np.concatenate([design[:, there], root])
                # Solved for the way from the teacher: where the rows leave the weights open, the nearest count.
                undone = np.concatenate([target[:, row] - design[:, there] @ own[there], 0.0 * own[there]])
                made[row, there] = own[there] + np.linalg.lstsq(system, undone, rcond=1e-9)[0]
            gap = x_t[unseen] @ weight.T + lacks[unseen] - x_s[unseen] @ made.T
            found[at] += (gap**2).sum()
    return found


def chosen(folds, candidates, weight, mask=None, columns=None, lean=0.0):
    mask = np.ones(weight.shape, bool) if mask is None else mask
    columns = np.ones(weight.shape[1], bool) if columns is None else columns
    teacher, stays, alive = torch.tensor(weight)[None], torch.tensor(mask)[None], torch.tensor(columns)
    return choose(folds, candidates, teacher, stays, alive, bias=True, lean=lean)


def same_moments(found, expected):
    assert found.count == expected.count
    for name in ("tt", "ts", "ss"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- Folds


@pytest.mark.parametrize("how", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("bias", [False, True])
def test_folds_sum_to_the_moments_of_all_rows(random_layer, how, bias):
    layer = random_layer(1, shots=11, **how)
    chunks = layer.teacher.split(4), layer.student.split(4)

    folds = measure_folds(*chunks, None, layer.geometry, bias=bias, rows=11, samples=5, folds=3)

    assert len(folds) == 3 and all(fold.missing is None for fold in folds)
    same_moments(total(folds).moments, measure(*chunks, layer.geometry, bias=bias))
    assert total(folds).missing is None


@pytest.mark.parametrize(
    ("how", "shape"),
    [
        (CASES["plain"], (11, 6, 7, 6)),
        (CASES["grouped"], (11, 6, 4, 6)),
        (CASES["linear"], (11, 6)),
        (CASES["linear on sequences"], (11, 3, 6)),
    ],
    ids=["plain", "grouped", "linear", "linear on sequences"],
)
def test_what_lacks_sums_to_that_of_all_rows(random_layer, how, shape):
    layer = random_layer(2, shots=11, **how)
    teacher, student, *beside = (x.split(4) for x in (layer.teacher, layer.student, *branch(shape, 3)))

    folds = measure_folds(teacher, student, tuple(beside), layer.geometry, bias=True, rows=11, samples=5, folds=3)

    expected = measure_missing(teacher, student, tuple(beside), layer.geometry, bias=True)
    assert len({fold.moments.count for fold in folds}) > 1  # so they have to be weighed
    for mine, theirs in zip(total(folds).missing, expected, strict=True):
        assert float(theirs.abs().max()) > 0.01
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("samples", "rows", "wanted"), [(7, 7, 3), (7, 25, 3), (10, 128, 5), (3, 12, 3), (2, 9, 3)])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_all_views_of_a_sample_are_in_one_fold(samples, rows, wanted, chunk):
    shown = torch.arange(rows) % samples
    x = torch.nn.functional.one_hot(shown, samples).double()
    views = torch.bincount(shown, minlength=samples).double()

    folds = measure_folds(
        x.split(chunk), (2 * x).split(chunk), None, LINEAR, bias=False, rows=len(x), samples=samples, folds=wanted
    )

    # A sample's column is lit by its own views alone, so the diagonal counts them.
    counts = torch.stack([fold.moments.tt[0].diagonal() * fold.moments.count for fold in folds])
    assert len(folds) == min(wanted, samples)
    torch.testing.assert_close(counts.sum(0), views)
    assert torch.equal((counts > 0.5).sum(0), torch.ones(samples, dtype=torch.long))
    per_fold = (counts > 0.5).sum(1)
    assert int(per_fold.max() - per_fold.min()) <= 1
    for fold in folds:
        torch.testing.assert_close(fold.moments.ts, 2 * fold.moments.tt)


@pytest.mark.parametrize("how", [CASES["grouped"], CASES["linear"]], ids=["grouped", "linear"])
def test_chunks_of_a_fixed_batch_make_the_folds_that_one_chunk_makes(random_layer, how):
    layer = random_layer(4, shots=12, **how)

    def folds(size):
        chunks = layer.teacher.split(size), layer.student.split(size)
        return measure_folds(*chunks, None, layer.geometry, bias=True, rows=12, samples=4, folds=3)

    for size in (1, 2, 5):
        for mine, theirs in zip(folds(size), folds(12), strict=True):
            same_moments(mine.moments, theirs.moments)


def test_a_fold_of_a_grouped_layer_is_measured_on_its_own_rows(random_layer):
    layer = random_layer(5, shots=8, groups=2)

    folds = measure_folds([layer.teacher], [layer.student], None, layer.geometry, bias=True, rows=8, samples=8, folds=3)

    for at, fold in enumerate(folds):
        expected = measure([layer.teacher[at::3]], [layer.student[at::3]], layer.geometry, bias=True)
        same_moments(fold.moments, expected)


@pytest.mark.parametrize(("samples", "count"), [(1, 1), (2, 2), (3, 3)])
def test_there_are_no_more_folds_than_samples(samples, count):
    x_t, x_s, _ = rows_of(6, samples)

    folds = folds_of(x_t, x_s, folds=3)

    assert [fold.moments.count for fold in folds] == [1] * count


def test_there_is_one_fold_where_the_first_axis_is_not_that_of_the_samples():
    x_t, x_s = (torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))

    folds = measure_folds([x_t], [x_s], None, LINEAR, bias=True, rows=12, samples=12, folds=3)

    assert [fold.moments.count for fold in folds] == [24]


def test_networks_that_agree_are_measured_once_and_a_branch_that_agrees_lacks_nothing():
    x = [torch.tensor(rows_of(7, 6)[0])]
    same, other = [torch.ones(6, 4).double()], [torch.zeros(6, 4).double()]

    alike = measure_folds(x, x, (same, same), LINEAR, bias=True, rows=6, samples=6, folds=3)
    apart = measure_folds(x, x, (same, other), LINEAR, bias=True, rows=6, samples=6, folds=3)

    for fold in (*alike, *apart):
        assert fold.moments.tt is fold.moments.ts is fold.moments.ss
    assert all(fold.missing is None for fold in alike)
    assert all(fold.missing is not None for fold in apart)


def test_no_fold_is_empty_where_the_rows_of_a_sample_were_left_out():
    x_t, x_s, _ = rows_of(8, 2)

    folds = folds_of(x_t, x_s, samples=3, folds=3)

    assert [fold.moments.count for fold in folds] == [1, 1]


# ---------------------------------------------------------------------------------------------------------- A choice


def test_regression_is_chosen_where_there_is_upstream_error_to_make_up_for():
    x_t, x_s, weight = rows_of(9, 90, noise=0.05)
    candidates = [(correction(), 0.01), (imitation(), 0.01), (regression(), 0.01)]

    folds = folds_of(x_t, x_s)

    assert chosen(folds, candidates, weight, lean=0.3) == 2
    assert chosen(folds, candidates[::-1], weight, lean=0.3) == 0


def test_a_strong_ridge_is_chosen_where_samples_are_few_and_noisy():
    random = np.random.default_rng(10)
    x_t = random.standard_normal((24, 12))
    x_s = x_t + 0.4 * random.standard_normal(x_t.shape)
    weight = random.standard_normal((4, 13))
    candidates = [(regression(), 0.0), (regression(), 0.3)]

    assert chosen(folds_of(x_t, x_s), candidates, weight, lean=0.2) == 1
    # Views of the noise that the fit sees would hide it: with many samples nothing is gained.
    x_t = random.standard_normal((3000, 12))
    x_s = x_t + 0.4 * random.standard_normal(x_t.shape)
    assert chosen(folds_of(x_t, x_s), candidates, weight) == 0


def test_there_is_no_choice_from_one_fold():
    x_t, x_s, weight = rows_of(11, 30, noise=0.05)
    candidates = [(correction(), 0.01), (regression(), 0.01)]

    assert chosen(folds_of(x_t, x_s, folds=2), candidates, weight) == 1
    assert chosen(folds_of(x_t, x_s, folds=1), candidates, weight) == 0
    assert chosen(folds_of(x_t, x_s, samples=1), candidates, weight) == 0


CANDIDATES = [
    (soft(0.9, 0.5), 0.02),
    (regression(), 0.01),
    (correction(), 0.0),
    (regression(), 0.5),
    (soft(1, 0.3), 0.1),
]


def problem(seed):
    """A layer with views of few samples, part of whose weights are gone, and a column altogether."""
    random = np.random.default_rng(seed)
    samples, views = int(random.integers(5, 30)), int(random.integers(1, 4))
    x_t, x_s, weight = rows_of(seed, samples * views, noise=random.uniform(0.05, 2.0))
    mask = random.random(weight.shape) < 0.7
    columns = np.ones(weight.shape[1], bool)
    columns[random.integers(6)] = False
    fold = np.arange(len(x_t)) % samples % 3
    return x_t, x_s, weight, mask & columns, columns, samples, fold


def test_the_choice_is_that_of_least_squares_on_the_rows_of_the_folds():
    met = set()
    for seed in range(30):
        x_t, x_s, weight, mask, columns, samples, fold = problem(seed)
        errors = errors_by_hand(x_t, x_s, weight, CANDIDATES, mask, columns, fold)

        found = chosen(folds_of(x_t, x_s, samples=samples), CANDIDATES, weight, mask, columns)

        assert found == errors.argmin()
        met.add(found)
    assert len(met) >= 3


def test_a_change_needs_the_lean_and_no_more():
    sharp = 0
    for seed in range(24):
        x_t, x_s, weight, mask, columns, samples, fold = problem(100 + seed)
        errors = errors_by_hand(x_t, x_s, weight, CANDIDATES, mask, columns, fold)
        best, gain = int(errors.argmin()), 1 - errors.min() / errors[0]
        if not best:
            continue
        folds = folds_of(x_t, x_s, samples=samples)
        assert chosen(folds, CANDIDATES, weight, mask, columns, lean=gain - 1e-7) == best
        assert chosen(folds, CANDIDATES, weight, mask, columns, lean=gain + 1e-7) == 0
        sharp += 1
    assert sharp > 10


def test_a_group_of_a_layer_is_judged_like_a_layer_of_its_own(random_layer):
    """What a grouped layer's candidates err is the sum over its groups, each by least squares on its own channels."""
    changed = 0
    for seed in range(8):
        layer = random_layer(200 + seed, shots=7, groups=2, kernel=(1, 1), size=(2, 1), pads=(0, 0, 0, 0))
        weight = to_matrix(layer.weight, layer.bias, layer.geometry)
        fold = np.repeat(np.arange(7) % 3, 2)
        errors = np.zeros(len(CANDIDATES))
        for group, own in enumerate(weight.numpy()):
            x_t, x_s = (
                x[:, 2 * group : 2 * group + 2].movedim(1, -1).reshape(14, 2).numpy()
                for x in (layer.teacher, layer.student)
            )
            errors += errors_by_hand(x_t, x_s, own, CANDIDATES, own == own, own[0] == own[0], fold)

        folds = measure_folds(
            [layer.teacher], [layer.student], None, layer.geometry, bias=True, rows=7, samples=7, folds=3
        )
        stays, alive = torch.ones_like(weight, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
        found = choose(folds, CANDIDATES, weight, stays, alive, bias=True, lean=0.0)

        assert found == errors.argmin()
        changed += found > 0
    assert changed >= 2


def with_a_branch(seed):
    """Such a layer, and what it is added to: part of what lacks can be made up for, part cannot."""
    x_t, x_s, weight, mask, columns, samples, fold = problem(seed)
    random = np.random.default_rng(seed)
    whole = random.standard_normal((len(x_t), len(weight)))
    lacks = 0.5 * (x_t + x_s) @ random.standard_normal((x_s.shape[1], len(weight)))
    beside = whole, whole - lacks - random.standard_normal(whole.shape)
    folds = folds_of(x_t, x_s, beside, samples)
    return folds, weight, mask, columns, errors_by_hand(x_t, x_s, weight, CANDIDATES, mask, columns, fold, beside)


def test_with_another_branch_the_choice_is_that_of_least_squares_on_the_sum():
    met = set()
    for seed in range(300, 325):
        folds, weight, mask, columns, errors = with_a_branch(seed)

        found = chosen(folds, CANDIDATES, weight, mask, columns)

        assert found == errors.argmin()
        met.add(found)
    assert len(met) >= 3


def test_with_another_branch_a_change_needs_the_lean_and_no_more():
    wrong = 0
    for seed in range(300, 325):
        folds, weight, mask, columns, errors = with_a_branch(seed)
        best, gain = int(errors.argmin()), 1 - errors.min() / errors[0]
        if best:
            wrong += chosen(folds, CANDIDATES, weight, mask, columns, lean=gain - 1e-7) != best
            wrong += chosen(folds, CANDIDATES, weight, mask, columns, lean=gain + 1e-7) != 0
    assert wrong == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_fold_of_some_columns_has_the_errors_of_the_whole_with_the_others_at_zero(seed: int) -> None:
    torch.manual_seed(seed)
    x_t, x_s = torch.randn(2, 40, 6).double()
    beside = ([torch.randn(40, 4).double()], [torch.randn(40, 4).double()])
    teacher = torch.randn(1, 4, 7).double()
    (whole,) = measure_folds([x_t], [x_s], beside, LINEAR, bias=True, rows=40, samples=40, folds=1)
    whole = whole.with_teacher(teacher)
    columns = torch.tensor([True, False, True, True, False, False, True])
    part = whole.restricted(columns, bias=True)

    for candidate in ((soft(0.9, 0.5), 0.3), (cross(0.4), 0.1), (regression(), 0.0)):
        expected = restricted(whole.quadratic(candidate, teacher, bias=True), columns)
        found = part.quadratic(candidate, teacher[..., columns], bias=True)
        torch.testing.assert_close(found.hess, expected.hess)
        torch.testing.assert_close(found.lin, expected.lin)
    both = (part + part).quadratic((soft(0.9, 0.5), 0.3), teacher[..., columns], bias=True)
    torch.testing.assert_close(both.hess, part.quadratic((soft(0.9, 0.5), 0.3), teacher[..., columns], bias=True).hess)
