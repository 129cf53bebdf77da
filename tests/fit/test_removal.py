"""Greedy removal against refitting every candidate from scratch with numpy."""

from itertools import combinations

import numpy as np
import pytest
import torch

from xdonnx.columns import to_matrix
from xdonnx.connection import Quadratic, damped, objective, regression
from xdonnx.errors import JobError
from xdonnx.moments import measure
from xdonnx.solve import Greedy, refit, remove_jointly
from xdonnx.structure import Channel, Element


def correlated(seed, *, groups=1, outputs=3, widths=(2, 1, 3, 1, 2), pinned=2, factors=2, positions=60, noise=0.3):
    """A problem whose channels can stand in for one another, with a pinned column and a bias."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    columns = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))
    columns = torch.cat([columns, torch.full((pinned,), -1)])
    d = len(columns)
    x = normal(groups, d, factors) @ normal(groups, factors, positions) + noise * normal(groups, d, positions)
    if pinned:
        x[:, -1] = 1
    target = normal(groups, outputs, d) @ x + 0.1 * normal(groups, outputs, positions)
    q = Quadratic(x @ x.mT / positions, target @ x.mT / positions, target.square().sum((1, 2)) / positions)
    return q, x, target, Channel(columns)


def error_without(x, target, columns, kept):
    """The best error with some channels kept, by least squares on the data."""
    total = 0.0
    stays = np.isin(columns.numpy(), [*kept, -1])
    for inputs, wanted in zip(x.numpy(), target.numpy(), strict=True):
        weight = np.linalg.lstsq(inputs[stays].T, wanted.T, rcond=None)[0]
        total += np.square(wanted - (inputs[stays].T @ weight).T).sum() / inputs.shape[1]
    return total


def kept_units(solution, structure):
    return {int(u) for u in structure.columns[solution.mask[0, 0]] if u >= 0}


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_each_removal_is_the_cheapest_of_all(seed, groups):
    q, x, target, structure = correlated(seed, groups=groups)
    units = set(range(structure.count))

    for keep in range(structure.count - 1, 0, -1):
        error, gone = min((error_without(x, target, structure.columns, units - {u}), u) for u in units)
        units.remove(gone)
        found = Greedy(swaps=0)(q, torch.zeros_like(q.lin), structure, keep)
        assert kept_units(found, structure) == units
        assert found.objective == pytest.approx(error, rel=1e-8)


def test_rounds_of_downdates_choose_as_fresh_inversions_do():
    # Enough channels for several removals between two inversions.
    q, x, target, structure = correlated(5, widths=(1, 2) * 16, factors=8, positions=400)
    units = set(range(structure.count))
    for _ in range(20):
        units.remove(min((error_without(x, target, structure.columns, units - {u}), u) for u in units)[1])

    found = Greedy(swaps=0)(q, torch.zeros_like(q.lin), structure, structure.count - 20)

    assert kept_units(found, structure) == units
    assert found.steps == 20


@pytest.mark.parametrize("seed", range(6))
def test_all_but_one_and_all_but_two_are_the_best_choice(seed):
    q, x, target, structure = correlated(seed, widths=(2, 1, 3, 1, 2, 2))
    for gone in (1, 2):
        keep = structure.count - gone
        best = min(error_without(x, target, structure.columns, kept) for kept in combinations(range(6), keep))
        found = Greedy()(q, torch.zeros_like(q.lin), structure, keep)
        assert found.objective == pytest.approx(best, rel=1e-8)


def test_exchanges_repair_what_greed_got_wrong():
    repaired = 0
    for seed in range(40):
        q, x, target, structure = correlated(seed, widths=(1,) * 7, outputs=1, factors=3, positions=30)
        best = min(error_without(x, target, structure.columns, kept) for kept in combinations(range(7), 3))
        greedy = Greedy(swaps=0)(q, torch.zeros_like(q.lin), structure, 3)
        swapped = Greedy(swaps=16)(q, torch.zeros_like(q.lin), structure, 3)
        assert swapped.objective <= greedy.objective * (1 + 1e-9)
        assert int(swapped.mask.sum()) == int(greedy.mask.sum())
        repaired += greedy.objective > best * 1.001 and swapped.objective < best * (1 + 1e-8)
    assert repaired >= 3


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_no_single_exchange_is_left_that_helps(seed, groups):
    shape = dict(widths=(2, 2, 1, 2, 2, 2, 3, 2), outputs=1, factors=5, positions=30, noise=0.1)
    q, x, target, structure = correlated(seed, groups=groups, **shape)

    found = Greedy(swaps=50)(q, torch.zeros_like(q.lin), structure, 4)

    kept = kept_units(found, structure)
    for back in set(range(8)) - kept:
        for leaver in kept:
            other = error_without(x, target, structure.columns, (kept | {back}) - {leaver})
            assert other >= found.objective * (1 - 1e-8)


def test_several_readers_add_their_shares():
    wide = correlated(8, widths=(2, 1, 3, 1, 2), outputs=4)
    # The second reader is loud, and never reads channel 4.
    q, x, target, structure = correlated(9, widths=(1, 1, 2, 1), groups=2)
    loud = (Quadratic(q.hess, 100 * q.lin, 1e4 * q.const), x, 100 * target, structure)
    units = set(range(5))

    def cost(kept):
        return sum(error_without(x, y, s.columns, kept) / float(q.const.sum()) for q, x, y, s in (wide, loud))

    for keep in (4, 3, 2, 1):
        units.remove(min((cost(units - {u}), u) for u in units)[1])
        problems = [(q, torch.zeros_like(q.lin), s) for q, _, _, s in (wide, loud)]
        stays = remove_jointly(problems, keep)
        assert set(stays.nonzero()[:, 0].tolist()) == units


def test_a_reader_may_lose_all_that_it_reads():
    wide, x, target, structure = correlated(1, widths=(1, 2, 1, 1), pinned=0)
    narrow, _, _, first_two = correlated(15, widths=(1, 1), pinned=0)
    faint = Quadratic(narrow.hess, 1e-6 * narrow.lin, narrow.const)  # whose loss costs next to nothing
    best = min(combinations(range(4), 2), key=lambda kept: error_without(x, target, structure.columns, kept))
    assert best == (2, 3)

    for swaps in (0, 5):
        problems = [(q, torch.zeros_like(q.lin), s) for q, s in ((wide, structure), (faint, first_two))]
        stays = remove_jointly(problems, 2, swaps=swaps)
        assert stays.tolist() == [False, False, True, True]


def test_joint_removal_of_one_reader_is_greedy():
    q, _, _, structure = correlated(10)
    start = torch.zeros_like(q.lin)
    stays = remove_jointly([(q, start, structure)], 2, swaps=16)
    found = Greedy(swaps=16)(q, start, structure, 2)
    assert set(stays.nonzero()[:, 0].tolist()) == kept_units(found, structure)


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_fewer_positions_than_weights_do_not_stop_it(random_layer, ridge):
    layer = random_layer(11, channels=8, outputs=4, shots=1, size=(4, 4))
    quiet = layer.teacher.clone()
    quiet[:, 3] = 0  # a dead channel
    moments = measure([quiet], [quiet], layer.geometry, bias=True)
    teacher = to_matrix(layer.weight, layer.bias, layer.geometry)
    q = damped(objective(regression(), moments, teacher), teacher, ridge, bias=True)
    columns = torch.cat([torch.arange(8).repeat_interleave(9), torch.tensor([-1])])

    found = Greedy()(q, teacher, Channel(columns), 5)

    assert bool(found.weight.isfinite().all())
    assert 3 not in kept_units(found, Channel(columns)) or ridge
    magnitude = Channel(columns).project(teacher, 5)
    assert found.objective <= float(q(refit(q, magnitude, teacher))) + 1e-9


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_channels_that_copy_others_go_first_and_cost_nothing(noise):
    _, x, target, structure = correlated(13, widths=(2,) * 6)
    x[:, 4:8] = x[:, 0:4] * (1 + noise * torch.arange(60))
    q = Quadratic(x @ x.mT / 60, target @ x.mT / 60, target.square().sum((1, 2)) / 60)

    found = Greedy()(q, torch.zeros_like(q.lin), structure, 4)

    kept = kept_units(found, structure)
    assert kept & {0, 2} and kept & {1, 3} and {4, 5} < kept
    whole = error_without(x, target, structure.columns, range(6))
    assert found.objective == pytest.approx(whole, rel=1e-3)


def test_greedy_refuses_single_weights_and_counts_out_of_reach():
    q, _, _, structure = correlated(12)
    start = torch.zeros_like(q.lin)
    with pytest.raises(JobError, match=r"removes whole channels.*\n.*admm or pgd"):
        Greedy()(q, start, Element(structure.columns >= 0, rows=3), 4)
    for keep in (0, structure.count + 1):
        with pytest.raises(JobError, match="cannot keep"):
            Greedy()(q, start, structure, keep)
        with pytest.raises(JobError, match="cannot keep"):
            remove_jointly([(q, start, structure)], keep)


@pytest.mark.parametrize("units", [40, 96])
def test_quarters_at_once_cost_little_more_than_one_by_one(monkeypatch, units):
    generator = torch.Generator().manual_seed(units)
    d, width = units * 3, 3
    mix = torch.randn((d, d // 3), generator=generator, dtype=torch.float64)
    x = mix @ torch.randn((d // 3, 8 * d), generator=generator, dtype=torch.float64)
    x += torch.randn((d, 8 * d), generator=generator, dtype=torch.float64)
    teacher = torch.randn((1, 24, d), generator=generator, dtype=torch.float64)
    hess = (x @ x.T / x.shape[1])[None]
    q = damped(Quadratic(hess, teacher @ hess, ((teacher @ hess) * teacher).sum((1, 2))), teacher, 0.01, bias=False)
    channel = Channel(torch.arange(units).repeat_interleave(width))

    one_by_one = Greedy(swaps=0)(q, teacher, channel, units // 2)
    monkeypatch.setattr("xdonnx.removal.WIDE", 0)
    monkeypatch.setattr("xdonnx.solve.WIDE", 0)
    at_once = Greedy(swaps=4)(q, teacher, channel, units // 2)

    assert int(at_once.mask.any(1).sum()) == units // 2 * width
    assert at_once.objective == pytest.approx(float(q(at_once.weight)), rel=1e-9)
    assert one_by_one.objective <= at_once.objective * (1 + 1e-9)
    assert at_once.objective < 1.05 * one_by_one.objective
