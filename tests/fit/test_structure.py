"""Structures against brute force: the nearest point, and the minimiser that a prox promises to be."""

from itertools import combinations

import pytest
import torch

from xdonnx.errors import JobError
from xdonnx.structure import Channel, Element, NofM


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_but_last(d):
    return torch.arange(d) < d - 1


def element():
    return Element(all_but_last(4), rows=2 * 1), normal(2, 1, 4, seed=1)


def channel():
    return Channel(torch.tensor([0, 0, 2, 1, 1, 1, -1])), normal(2, 3, 7, seed=2)


def two_of_four():
    # Five channels of two kernel offsets, and the bias: a last block of one channel.
    return NofM(2, 4, 2, all_but_last(11), rows=2), normal(1, 2, 11, seed=3)


def supports(structure, w, keep):
    """Every mask that the structure allows with that many units, straight from its definition."""
    if isinstance(structure, Channel):
        for kept in combinations(range(3), keep):
            yield torch.tensor([int(u) in (*kept, -1) for u in structure.columns]).expand(w.shape)
    elif isinstance(structure, Element):
        free = [(g, o, c) for g in range(w.shape[0]) for o in range(w.shape[1]) for c in range(w.shape[2] - 1)]
        for kept in combinations(free, keep):
            mask = torch.zeros_like(w, dtype=torch.bool)
            mask[..., -1] = True
            for at in kept:
                mask[at] = True
            yield mask


@pytest.mark.parametrize("make", [element, channel])
def test_project_is_nearest(make):
    structure, w = make()
    for keep in range(1, structure.count + 1):
        mask = structure.project(w, keep)

        best = min(float((w - w * m).square().sum()) for m in supports(structure, w, keep))
        assert any(torch.equal(mask, m) for m in supports(structure, w, keep))
        assert float((w - w * mask).square().sum()) == pytest.approx(best, abs=1e-12)


def test_the_pattern_is_nearest_and_runs_along_channels():
    structure, w = two_of_four()

    mask = structure.project(w, structure.least)

    blocks = [(row, offset, span) for row in range(2) for offset in (0, 1) for span in (range(4), range(4, 5))]
    for row, offset, span in blocks:
        columns = [channel * 2 + offset for channel in span]
        kept = {c for c in columns if mask[0, row, c]}
        largest = sorted(columns, key=lambda c: -abs(float(w[0, row, c])))[:2]
        assert kept == set(largest)
    assert mask[..., -1].all()
    assert int(mask[..., :-1].sum()) == structure.least == 2 * 2 * (2 + 1)
    assert structure.count == 20


def test_between_all_and_the_pattern_the_smallest_losers_leave_first():
    structure, w = two_of_four()
    pattern = structure.project(w, structure.least)
    losers = sorted(float(x) for x in w[~pattern].abs())

    for more in range(len(losers) + 1):
        mask = structure.project(w, structure.least + more)
        assert bool((mask | ~pattern).all())
        gone = sorted(float(x) for x in w[~mask].abs())
        assert gone == losers[: len(losers) - more]


def test_a_kernel_of_one_leaves_the_bias_out_of_the_last_block():
    structure = NofM(1, 2, 1, all_but_last(5), rows=1)
    w = torch.tensor([[[1.0, 2.0, 4.0, 3.0, 100.0]]])
    assert structure.project(w, structure.least).tolist() == [[[False, True, True, False, True]]]


def test_of_equals_the_first_stay():
    ones = torch.ones(1, 2, 3)
    assert Element(torch.tensor([True, True, True]), 2).project(ones, 4).flatten().tolist() == [True] * 4 + [False] * 2
    assert Channel(torch.tensor([2, 0, 1])).project(ones, 2)[0, 0].tolist() == [False, True, True]
    assert NofM(1, 3, 1, torch.tensor([True] * 3), 2).project(ones, 2)[0].tolist() == [[True, False, False]] * 2


def test_channels_are_scored_over_rows_and_groups_together():
    structure, w = channel()
    for unit in range(3):
        part = w[:, :, structure.columns == unit]
        torch.testing.assert_close(structure.scores(w)[unit], part.norm())


def penalty(structure, w):
    if isinstance(structure, Channel):
        return sum(w[:, :, structure.columns == unit].norm() for unit in range(3))
    if isinstance(structure, Element):
        return w[..., :-1].abs().sum()
    blocks = [w[0, row, offset:stop:2] for row in range(2) for offset in (0, 1) for stop in (8,)]
    # The last block holds one channel, which may stay for free.
    return sum(block.abs().sort().values[:2].sum() for block in blocks)


@pytest.mark.parametrize("make", [element, channel, two_of_four])
@pytest.mark.parametrize("strength", [0.05, 0.4, 2.0])
def test_prox_is_the_minimiser(make, strength):
    structure, w = make()

    found = structure.prox(w, strength)

    def value(v):
        return float((v - w).square().sum() / 2 + strength * penalty(structure, v))

    least = value(found)
    generator = torch.Generator().manual_seed(4)
    for trial in range(400):
        scale = 10.0 ** -(trial % 5)
        other = found + scale * torch.randn(w.shape, generator=generator, dtype=torch.float64)
        if trial % 3 == 0:
            other = other * (torch.rand(w.shape, generator=generator) < 0.5)
        assert value(other) >= least - 1e-12
    assert torch.equal(found[..., -1], w[..., -1])


@pytest.mark.parametrize("make", [element, channel])
def test_prox_does_not_spread_points_apart(make):
    structure, w = make()
    for seed in range(20):
        a, b = 2 * normal(*w.shape, seed=100 + seed), 2 * normal(*w.shape, seed=200 + seed)
        moved = structure.prox(a, 0.7) - structure.prox(b, 0.7)
        # Firmly non-expansive, which is what makes proximal descent converge.
        assert float(moved.square().sum()) <= float((moved * (a - b)).sum()) + 1e-12


@pytest.mark.parametrize("make", [element, channel, two_of_four])
def test_a_count_out_of_reach_is_refused(make):
    structure, _ = make()
    structure.check(structure.count)
    structure.check(structure.least)
    for keep in (0, -3, structure.count + 1):
        with pytest.raises(JobError, match=str(keep)):
            structure.check(keep)


def test_a_pattern_keeps_its_own_count():
    structure, _ = two_of_four()
    with pytest.raises(JobError, match=r"2:4 keeps 12 of the 20 weights here, not 13\.\n.*keep=12"):
        structure.check(13)
    for n, m in ((0, 4), (4, 4), (5, 4)):
        with pytest.raises(JobError, match=f"{n}:{m} is no pattern"):
            NofM(n, m, 1, torch.ones(4, dtype=torch.bool), 1)
