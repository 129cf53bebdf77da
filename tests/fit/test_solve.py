"""Solvers against data space, numpy's least squares, and every support there is."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

from xdonnx.columns import from_matrix, to_matrix, unroll
from xdonnx.connection import Quadratic, cross, damped, objective, regression
from xdonnx.descent import Adam, Descent
from xdonnx.errors import JobError
from xdonnx.moments import measure
from xdonnx.solve import ADMM, PGD, SOLVERS, Greedy, refit
from xdonnx.structure import Channel, Element, NofM


def problem_of(layer, connection, *, bias=True, ridge=0.0):
    moments = measure([layer.teacher], [layer.student], layer.geometry, bias=bias)
    teacher = to_matrix(layer.weight, layer.bias if bias else None, layer.geometry)
    return damped(objective(connection, moments, teacher), teacher, ridge, bias=bias), teacher


def structures_of(teacher, kernel_size, *, bias=True):
    g, o, d = teacher.shape
    columns = torch.arange(d) // kernel_size
    if bias:
        columns[-1] = -1
    free = columns >= 0
    return {
        "element": Element(free, g * o),
        "channel": Channel(columns),
        "2:4": NofM(2, 4, kernel_size, free, g * o),
    }


def half_of(structure):
    return max(structure.least, structure.count // 2) if not isinstance(structure, NofM) else structure.least


# ---------------------------------------------------------------------------------------------------------- refit


def test_refit_is_least_squares_on_the_data(random_layer):
    layer = random_layer(21, groups=2, shots=8)
    q, teacher = problem_of(layer, regression())
    mask = torch.rand(teacher.shape, generator=torch.Generator().manual_seed(22)) < 0.5
    mask[1, 0] = False  # a row that loses everything

    found = refit(q, mask, teacher)

    ones = torch.ones(1, 1, dtype=torch.float64)
    x_t, x_s = (unroll(x, layer.geometry) for x in (layer.teacher, layer.student))
    x_t, x_s = (torch.cat([x, ones.expand(2, 1, x.shape[2])], 1) for x in (x_t, x_s))
    target = (teacher @ x_t).numpy()
    assert bool((found[~mask] == 0).all())
    for group, row in np.ndindex(2, 3):
        columns = mask[group, row].nonzero()[:, 0]
        if len(columns):
            expected = np.linalg.lstsq(x_s[group, columns].numpy().T, target[group, row], rcond=None)[0]
            np.testing.assert_allclose(found[group, row, columns].numpy(), expected, rtol=1e-8, atol=1e-10)


def test_refit_of_a_shared_support_is_least_squares_on_the_data(random_layer):
    layer = random_layer(23, shots=8)
    q, teacher = problem_of(layer, regression())
    mask = structures_of(teacher, 9)["channel"].project(teacher, 2)

    found = refit(q, mask, teacher)

    x_t, x_s = (
        torch.cat([x[0], torch.ones_like(x[0, :1])])
        for x in (unroll(layer.teacher, layer.geometry), unroll(layer.student, layer.geometry))
    )
    columns = mask[0, 0].nonzero()[:, 0]
    expected = np.linalg.lstsq(x_s[columns].numpy().T, (teacher[0] @ x_t).numpy().T, rcond=None)[0].T
    np.testing.assert_allclose(found[0][:, columns].numpy(), expected, rtol=1e-8, atol=1e-10)


def test_refit_in_small_batches_is_the_same(random_layer, monkeypatch):
    layer = random_layer(24, groups=2, outputs=12)
    q, teacher = problem_of(layer, regression(), ridge=0.01)
    mask = torch.rand(teacher.shape, generator=torch.Generator().manual_seed(25)) < 0.4
    whole = refit(q, mask, teacher)

    monkeypatch.setattr("xdonnx.solve.BATCH_BYTES", 3 * 8 * 8 * 8)

    torch.testing.assert_close(refit(q, mask, teacher), whole, rtol=1e-12, atol=1e-12)


def test_refit_survives_rank_deficient_shots(random_layer):
    layer = random_layer(26, channels=8, shots=1, size=(4, 4))
    plain, teacher = problem_of(layer, regression())
    ridged, _ = problem_of(layer, regression(), ridge=1e-3)
    assert torch.linalg.matrix_rank(plain.hess[0]) < plain.hess.shape[1] // 2
    mask = structures_of(teacher, 9)["element"].project(teacher, teacher.numel() // 2)

    for q in (plain, ridged):
        found = refit(q, mask, teacher)
        assert bool((found[~mask] == 0).all())
        slope = q.grad(found)[mask]
        assert float(slope.abs().max()) < 1e-8 * float(q.lin.abs().max())
        assert float(found.abs().max()) < 100 * float(teacher.abs().max())


def test_where_the_minimum_is_not_unique_refit_takes_the_nearest():
    # One position, two inputs that are always equal: only the sum of the weights is determined.
    hess = torch.ones(1, 2, 2, dtype=torch.float64)
    q = Quadratic(hess, torch.tensor([[[4.0, 4.0]]], dtype=torch.float64), torch.tensor([16.0]))

    found = refit(q, torch.ones(1, 1, 2, dtype=torch.bool), torch.tensor([[[2.0, 0.0]]]))

    torch.testing.assert_close(found, torch.tensor([[[3.0, 1.0]]], dtype=torch.float64))


@pytest.mark.parametrize("seed", range(8))
def test_two_inputs_that_are_all_but_equal_do_not_send_weights_far_away(seed):
    # Often Cholesky gets through such a system, and what it then finds is noise.
    generator = torch.Generator().manual_seed(seed)
    x, apart = (torch.randn(1, 20, 60, dtype=torch.float64, generator=generator) for _ in range(2))
    x[:, -1] = x[:, 0] + 1e-9 * apart[:, 0]
    hess = x @ x.mT / 60
    best = torch.randn(1, 3, 20, dtype=torch.float64, generator=generator)
    start = best.clone()
    start[..., 0] += 1
    start[..., -1] -= 1

    found = refit(Quadratic(hess, best @ hess, ((best @ hess) * best).sum((1, 2))), torch.ones_like(best).bool(), start)

    # Both have the same error; the nearest to the start is the start.
    torch.testing.assert_close(found, start, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ PGD


def data_error(layer, weight, mu):
    """The published loss on outputs of real convolutions: `mu` correction + `1 - mu` imitation, or regression."""

    def run(x, w):
        how = layer.geometry
        return functional.conv2d(x, w, None, how.strides, how.pads[:2], how.dilations, how.groups)

    t, s = layer.teacher, layer.student
    if mu is None:
        return (run(t, layer.weight) - run(s, weight)).square().sum() / run(t, layer.weight).numel()
    parts = [(run(x, layer.weight) - run(x, weight)).square().sum() for x in (t, s)]
    return (mu * parts[0] + (1 - mu) * parts[1]) / run(t, layer.weight).numel()


def zero_smallest(weight, kept, structure):
    """Mask of what a hard threshold leaves, sorted in plain Python."""
    if structure == "channel":
        norms = [float(weight[:, channel].norm()) for channel in range(weight.shape[1])]
        best = sorted(range(len(norms)), key=lambda channel: -norms[channel])[:kept]
        mask = torch.zeros_like(weight)
        mask[:, best] = 1
        return mask
    flat = weight.abs().flatten().tolist()
    mask = torch.zeros(len(flat), dtype=weight.dtype)
    mask[sorted(range(len(flat)), key=lambda at: -flat[at])[:kept]] = 1
    return mask.reshape(weight.shape)


@pytest.mark.parametrize("mu", [None, 0.6])
@pytest.mark.parametrize("structure", ["element", "channel"])
def test_kept_ramp_walks_as_adam_does_on_real_convolutions(random_layer, structure, mu):
    layer = random_layer(31, groups=2, channels=8)
    total, rate, units = 60, 5e-3, {"element": layer.weight.numel(), "channel": 4}[structure]
    keep = units // 2

    weight = layer.weight.clone().requires_grad_()
    adam = torch.optim.Adam([weight], lr=rate)
    mask, third = torch.ones_like(weight), total // 3
    for t in range(total):
        adam.zero_grad()
        data_error(layer, weight, mu).backward()
        weight.grad *= mask
        if adam.state[weight]:
            adam.state[weight]["exp_avg"] *= mask
            adam.state[weight]["exp_avg_sq"] *= mask
        adam.step()
        with torch.no_grad():
            if t <= third:
                kept = int((units - keep) * (third - t) / third) + keep
                mask = zero_smallest(weight, kept, structure)
                weight *= mask
            elif structure == "channel":
                adam.param_groups[0]["lr"] = rate / 10

    weight = weight.detach()
    connection = regression() if mu is None else cross(mu)
    q, teacher = problem_of(layer, connection, bias=False)
    found = PGD(iterations=total, rate=rate, refit=False)(
        q, teacher, structures_of(teacher, 9, bias=False)[structure], keep
    )

    mine, _ = from_matrix(found.weight, layer.geometry, False, tuple(weight.shape))
    torch.testing.assert_close(mine, weight, rtol=1e-6, atol=1e-9)
    assert int((mine != 0).sum()) == int(mask.sum())
    assert found.objective / layer.weight.shape[0] == pytest.approx(float(data_error(layer, weight, mu)), rel=1e-6)


def shrink(weight, strength, structure):
    """The proximal step of the paper's text, for single weights and for input channels."""
    if structure == "element":
        return weight.sign() * torch.relu(weight.abs() - strength)
    channels = [
        weight[:, channel] * max(0.0, 1 - strength / float(weight[:, channel].norm()))
        if float(weight[:, channel].norm()) > 0
        else weight[:, channel]
        for channel in range(weight.shape[1])
    ]
    return torch.stack(channels, 1)


@pytest.mark.parametrize("structure", ["element", "channel"])
def test_lambda_ramp_walks_as_proximal_descent_does_on_real_convolutions(random_layer, structure):
    layer = random_layer(32, channels=6)
    total, units = 60, {"element": layer.weight.numel(), "channel": 6}[structure]
    keep, outputs = units // 2, layer.weight.shape[0]

    patches = functional.unfold(layer.student, layer.geometry.kernel, padding=1).movedim(1, 0).flatten(1)
    curvature = float(torch.linalg.matrix_norm(patches, 2)) ** 2 / patches.shape[1]
    weight, mask, strength, third = layer.weight.clone(), torch.ones_like(layer.weight), 0.0, total // 3
    for t in range(total):
        weight.requires_grad_()
        (slope,) = torch.autograd.grad(outputs * data_error(layer, weight, None), weight)
        weight = (weight - slope * mask / (2 * curvature)).detach()
        if t <= third:
            kept = int((units - keep) * (third - t) / third) + keep
            parts = weight.transpose(0, 1).flatten(1) if structure == "channel" else weight.reshape(-1, 1)
            ranked = sorted(parts.norm(dim=1).tolist(), reverse=True)
            strength = max(strength, ranked[kept] if kept < units else 0.0)
            weight = shrink(weight, strength, structure)
        if t == third:
            mask = zero_smallest(weight, keep, structure)
            weight = weight * mask

    q, teacher = problem_of(layer, regression(), bias=False)
    solver = PGD(iterations=total, optimizer="gradient", ramp="lambda", refit=False)
    found = solver(q, teacher, structures_of(teacher, 9, bias=False)[structure], keep)

    mine, _ = from_matrix(found.weight, layer.geometry, False, tuple(weight.shape))
    torch.testing.assert_close(mine, weight, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["element", "channel", "2:4"])
def test_descent_never_rises_while_the_kept_count_stands(random_layer, kind, monkeypatch):
    layer = random_layer(33, channels=8, groups=2)
    q, teacher = problem_of(layer, regression())
    structure, walk = structures_of(teacher, 9)[kind], []
    step = Descent.step
    monkeypatch.setattr(Descent, "step", lambda self, t: walk.append(self.weight) or step(self, t))

    found = PGD(iterations=90, optimizer="gradient", refit=False)(q, teacher, structure, half_of(structure))

    walk.append(found.weight)
    counts, errors = [int((w != 0).sum()) for w in walk], [float(q(w)) for w in walk]
    stands = [at for at in range(1, len(walk)) if counts[at] == counts[at - 1]]
    assert len(stands) >= 50 and counts == sorted(counts, reverse=True)
    assert all(errors[at] <= errors[at - 1] * (1 + 1e-12) for at in stands)
    assert errors[-1] < errors[stands[-55]]


@pytest.mark.parametrize("kind", ["element", "channel", "2:4"])
def test_pruned_weights_never_come_back_in_the_kept_ramp(random_layer, kind, monkeypatch):
    layer = random_layer(34, channels=8)
    q, teacher = problem_of(layer, regression())
    structure, walk = structures_of(teacher, 9)[kind], []
    step = Adam.step
    monkeypatch.setattr(Adam, "step", lambda self, t: walk.append(self.weight) or step(self, t))
    keep = structure.least if kind == "2:4" else structure.count // 4
    walk.append(PGD(iterations=90, rate=0.05, refit=False)(q, teacher, structure, keep).weight)
    for before, after in pairwise(walk):
        assert not bool(((before == 0) & (after != 0)).any())


@pytest.mark.parametrize("mu", [None, 0.9])
@pytest.mark.parametrize("kind", ["element", "channel"])
def test_steps_in_single_precision_end_at_the_same_error(random_layer, kind, mu):
    layer = random_layer(38, channels=8)
    q, teacher = problem_of(layer, regression() if mu is None else cross(mu))
    structure = structures_of(teacher, 9)[kind]
    double, single = (
        PGD(iterations=900, refit=False, single=single)(q, teacher, structure, half_of(structure))
        for single in (False, True)
    )
    assert torch.equal(single.mask, double.mask) and single.weight.dtype == torch.float64
    assert single.objective == pytest.approx(double.objective, rel=1e-3)
    assert single.objective == float(q(single.weight))


def test_descent_says_whether_it_had_arrived(random_layer):
    layer = random_layer(36)
    q, teacher = problem_of(layer, regression(), ridge=0.1)
    structure = structures_of(teacher, 9)["channel"]

    short, long = (PGD(iterations=n, optimizer="gradient", refit=False)(q, teacher, structure, 2) for n in (12, 600))

    best = float(q(refit(q, long.mask, teacher)))
    assert long.converged and long.objective == pytest.approx(best, rel=1e-3)
    assert not short.converged and short.objective > 1.01 * best


def test_a_frozen_bias_stays_the_teachers(random_layer):
    layer = random_layer(35)
    q, teacher = problem_of(layer, regression())
    structure = structures_of(teacher, 9)["channel"]
    for keep in (2, structure.count):
        for last in (False, True):
            found = PGD(iterations=30, freeze_bias=True, refit=last)(q, teacher, structure, keep)
            assert torch.equal(found.weight[..., -1], teacher[..., -1])
    # The others are the best that this bias allows.
    rest = found.mask.clone()
    rest[..., -1] = False
    assert float(q.grad(found.weight)[rest].abs().max()) < 1e-8 * float(q.lin.abs().max())


# ----------------------------------------------------------------------------------------------------------- ADMM


@pytest.mark.parametrize("seed", range(4))
def test_admm_comes_close_to_the_best_of_all_supports(random_layer, seed):
    layer = random_layer(40 + seed, channels=6, outputs=2, kernel=(1, 1), pads=(0, 0, 0, 0))
    q, teacher = problem_of(layer, regression())
    structure = structures_of(teacher, 1)["element"]
    best = np.inf
    for gone in combinations(range(12), 6):
        mask = torch.ones(1, 2, 7, dtype=torch.bool)
        for at in gone:
            mask[0, at // 6, at % 6] = False
        best = min(best, float(q(refit(q, mask, teacher))))

    found = ADMM()(q, teacher, structure, 6)

    assert int(found.mask.sum()) == 6 + 2
    assert best * (1 - 1e-9) <= found.objective <= 1.05 * best
    assert found.converged


@pytest.mark.parametrize("kind", ["element", "channel", "2:4"])
@pytest.mark.parametrize("groups", [1, 2])
def test_admm_is_feasible_and_better_than_magnitude(random_layer, kind, groups):
    layer = random_layer(45, channels=8, groups=groups)
    q, teacher = problem_of(layer, regression(), ridge=0.01)
    structure = structures_of(teacher, 9)[kind]
    keep = half_of(structure)

    found = ADMM()(q, teacher, structure, keep)

    magnitude = refit(q, structure.project(teacher, keep), teacher)
    assert bool((found.weight[~found.mask] == 0).all())
    assert found.objective == pytest.approx(float(q(found.weight)))
    assert found.objective <= float(q(magnitude))
    assert torch.equal(structure.project(torch.where(found.mask, 1 + found.weight.abs(), 0.0), keep), found.mask)


def test_admm_needs_no_refit_once_its_two_sides_agree(random_layer):
    layer = random_layer(47)
    q, teacher = problem_of(layer, regression())
    structure = structures_of(teacher, 9)["element"]

    found = ADMM(refit=False, ramp=0)(q, teacher, structure, 108)

    best = refit(q, found.mask, teacher)
    assert found.objective == pytest.approx(float(q(best)), rel=1e-3)
    torch.testing.assert_close(found.weight, best, rtol=0, atol=0.02)


def test_admm_reaches_the_count_even_in_one_iteration(random_layer):
    layer = random_layer(46)
    q, teacher = problem_of(layer, regression())
    structure = structures_of(teacher, 9)["element"]
    found = ADMM(iterations=1)(q, teacher, structure, 50)
    assert int(found.mask.sum()) == 50 + 6 and not found.converged


# ---------------------------------------------------------------------------------------------------- all of them

ALL = [
    PGD(iterations=60),
    PGD(iterations=60, optimizer="gradient"),
    PGD(iterations=60, ramp="lambda"),
    PGD(iterations=60, ramp="lambda", optimizer="gradient"),
    PGD(iterations=2),
    ADMM(),
    ADMM(ramp=0),
    Greedy(),  # last: it removes channels only
]
every_solver = pytest.mark.parametrize("solver", ALL, ids=str)


@pytest.mark.parametrize(
    ("solver", "kind"),
    [(solver, "channel") for solver in ALL] + [(solver, kind) for solver in ALL[:-1] for kind in ("element", "2:4")],
    ids=str,
)
def test_solvers_keep_exactly_what_they_were_told(random_layer, solver, kind):
    layer = random_layer(51, channels=8, groups=2)
    q, teacher = problem_of(layer, cross(0.6), ridge=0.01)
    structure = structures_of(teacher, 9)[kind]
    keep = half_of(structure)

    found, again = (solver(q, teacher.float(), structure, keep) for _ in range(2))

    per_unit = 9 * teacher.shape[0] * teacher.shape[1] if kind == "channel" else 1
    assert int(found.mask[..., :-1].sum()) == keep * per_unit
    assert bool(found.mask[..., -1].all()) and bool((found.weight[~found.mask] == 0).all())
    assert found.weight.dtype == torch.float64 and found.weight.shape == teacher.shape
    assert found.objective == pytest.approx(float(q(found.weight)), rel=1e-9)
    assert torch.equal(found.weight, again.weight)
    # Refitted: no other weights on this support do better.
    assert float(q.grad(found.weight)[found.mask].abs().max()) < 1e-8 * float(q.lin.abs().max())


@every_solver
def test_where_nothing_goes_solvers_only_refit(random_layer, solver):
    layer = random_layer(52, channels=6)
    q, teacher = problem_of(layer, regression(), ridge=0.01)
    structure = structures_of(teacher, 9)["channel"]

    found = solver(q, teacher, structure, structure.count)

    best = torch.linalg.solve(q.hess, q.lin.mT).mT
    assert bool(found.mask.all())
    torch.testing.assert_close(found.weight, best, rtol=1e-7, atol=1e-9)


@every_solver
def test_counts_out_of_reach_are_refused(random_layer, solver):
    layer = random_layer(53)
    q, teacher = problem_of(layer, regression())
    structure = structures_of(teacher, 9)["channel"]
    for keep in (0, -1, structure.count + 1):
        with pytest.raises(JobError, match=f"cannot keep {keep} of 4 channels"):
            solver(q, teacher, structure, keep)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: PGD(optimizer="sgd"), "unknown optimizer 'sgd'.*\n.*adam, gradient"),
        (lambda: PGD(ramp="linear"), "unknown ramp 'linear'.*\n.*kept, lambda"),
        (lambda: PGD(iterations=0), "iterations is 0"),
        (lambda: ADMM(rho=0.0), "rho is 0"),
        (lambda: ADMM(iterations=-1), "iterations is -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, text):
    with pytest.raises(JobError, match=text):
        make()


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_by_name_work_with_their_defaults(random_layer, name):
    layer = random_layer(54)
    q, teacher = problem_of(layer, regression(), ridge=0.01)
    structure = structures_of(teacher, 9)["channel"]
    best = min(
        float(q(refit(q, structure.spread(torch.tensor([at in kept for at in range(4)]), teacher), teacher)))
        for kept in combinations(range(4), 2)
    )

    found = SOLVERS[name]()(q, teacher, structure, 2)

    assert best * (1 - 1e-9) <= found.objective <= 1.1 * best
