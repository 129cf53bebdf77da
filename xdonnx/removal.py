"""Which channels to lose: exact group optimal brain surgeon, for one reader of the channels or for many.

For one layer with error `q(W) = <W H, W> - 2 <C, W> + c` and best weights `W = C P`, `P = inv(H)` on the columns
that are left, losing the columns J of a channel costs exactly `tr(W_J inv(P_JJ) W_J')` when all others adapt. So
the cheapest channel leaves, `P` and `W` are downdated, and so on; then exchanges of a lost channel for a kept one
go on as long as they lower the error. Several layers that read the same channels add their costs. For
dimensions see `moments`.

References
----------
Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992, for one
weight; the block form is the same algebra. Exchanges follow the idea of local search in OSSCAR (ICML 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xdonnx.columns import among

SHRINK = 8
"""One in so many channels may leave before the matrices are cut down and inverted afresh."""

WORTH = 1e-9
"""An exchange must save that share of the readers' energy: below it, rounding decides."""


TOGETHER = 64
"""Below twice as many channels they leave one by one; above, the cheapest leave a few at a time."""

WIDE, QUARTER = 1600, 4
"""Above so many columns a quarter of the channels leaves at once, and no exchange is tried: each costs seconds."""

TRIED = 16
"""Lost channels, those whose return would gain most, that an exchange is tried with: wide layers lose hundreds."""


@dataclass(frozen=True, eq=False)
class Reader:
    """One layer that reads the channels.

    Parameters
    ----------
    hess : Tensor (g, d, d)
        H, positive definite, float64.
    lin : Tensor (g, o, d)
        C.
    table : LongTensor (units, widest)
        Columns of every channel, filled up with -1.
    share : float
        What one unit of this layer's error weighs in the sum over readers.
    """

    hess: Tensor
    lin: Tensor
    table: Tensor
    share: float = 1.0


@dataclass(frozen=True, eq=False)
class _View:
    """A reader on the columns that are left.

    `spots` is its table in terms of `columns`, -1 if a channel is gone; `weight` is (g, d, o), so that a channel's are
    next to each other. Downdates keep up `inverse` and `weight`, not `factor`, the Cholesky factor of H as it was when
    the view was made.
    """

    reader: Reader
    columns: Tensor
    spots: Tensor
    factor: Tensor
    inverse: Tensor
    weight: Tensor


def choose(readers: Sequence[Reader], keep: int, swaps: int, *, rough: bool = False) -> tuple[Tensor, int]:
    """Channels to keep so that the readers' error rises least.

    Parameters
    ----------
    readers
        Their tables have the same number of rows.
    keep
        Channels that stay, at least one.
    swaps
        Exchanges to try at most after the greedy removal.
    rough
        Treat all readers as wide ones.

    Returns
    -------
    kept : BoolTensor (units,)
    steps : int
        Removals and exchanges made.
    """
    units = readers[0].table.shape[0]
    if units >= 2 * TOGETHER:
        swaps = 0  # an exchange costs an inversion and saves next to nothing among so many
    kept = torch.ones(units, dtype=torch.bool, device=readers[0].hess.device)
    left, steps = units, 0
    if rough or max(reader.hess.shape[1] for reader in readers) > WIDE:
        ranked = [_ranked(reader) for reader in readers]
        swaps = 0
        while left > keep:
            leaving = min(left - keep, -(-left // QUARTER))
            kept = _remove_at_once(ranked, kept, leaving)
            left, steps = left - leaving, steps + leaving
    while left > keep:
        leaving = min(left - keep, -(-left // SHRINK))
        kept = _remove(readers, kept, leaving)
        left, steps = left - leaving, steps + leaving
    for _ in range(swaps):
        pair = _best_exchange(readers, kept)
        if pair is None:
            break
        kept[pair[0]], kept[pair[1]] = True, False
        steps += 1
    return kept, steps


def _remove(readers: Sequence[Reader], kept: Tensor, leaving: int) -> Tensor:
    """Let the cheapest channels go one by one, downdating in between."""
    views = [_view(reader, kept) for reader in readers]
    kept = kept.clone()
    while leaving:
        cost = sum((_costs(view) for view in views), start=torch.zeros(()))
        together = min(leaving, max(1, int(kept.sum()) // TOGETHER))
        order = torch.argsort(torch.where(kept, cost, torch.inf), stable=True)[:together]
        kept[order] = False
        leaving -= together
        if leaving:
            views = [_without(view, order) for view in views]
    return kept


@dataclass(frozen=True, eq=False)
class _Ranked:
    """A wide reader scaled to a unit diagonal, in float32: ranks are all that is wanted of it."""

    reader: Reader
    hess: Tensor
    lin: Tensor


def _ranked(reader: Reader) -> _Ranked:
    scale = reader.hess.diagonal(dim1=1, dim2=2).clamp(min=1e-30).rsqrt()
    # float32 keeps its digits where the diagonal is one. Rounding may leave an eigenvalue of zero a little below it.
    hess = reader.hess.float() * scale.float()[:, :, None] * scale.float()[:, None]
    hess.diagonal(dim1=1, dim2=2).mul_(1 + 1e-5)
    return _Ranked(reader, hess, (reader.lin * scale[:, None]).float())


def _remove_at_once(ranked: Sequence[_Ranked], kept: Tensor, leaving: int) -> Tensor:
    """Let the cheapest channels go together."""
    cost = sum((_costs_alone(one, kept) for one in ranked), start=torch.zeros(()))
    kept = kept.clone()
    kept[torch.argsort(torch.where(kept, cost, torch.inf), stable=True)[:leaving]] = False
    return kept


def _costs_alone(ranked: _Ranked, kept: Tensor) -> Tensor:
    """Return the rise of the reader's error if each of the kept channels alone were lost, (units,)."""
    columns, spots = _places(ranked.reader, kept)
    hess = ranked.hess if len(columns) == ranked.hess.shape[1] else among(ranked.hess, columns)
    factor, failed = torch.linalg.cholesky_ex(hess)
    if bool(failed.any()):
        factor = torch.linalg.cholesky(hess.double() + 1e-6 * torch.eye(len(columns), device=hess.device))
    inverse = torch.cholesky_inverse(factor)
    weight = inverse @ ranked.lin.index_select(2, columns).to(inverse).mT
    return _costs(_View(ranked.reader, columns, spots, factor, inverse, weight)).double()


def _best_exchange(readers: Sequence[Reader], kept: Tensor) -> tuple[int, int] | None:
    """Lost and kept channel whose exchange lowers the error most, or None if none does."""
    lost = (~kept).nonzero()[:, 0]
    if not len(lost):
        return None
    views = [_view(reader, kept) for reader in readers]
    returns = [_Returns(view, lost) for view in views]
    gain = torch.stack([back.gain for back in returns]).sum(0)
    best, pair = -WORTH, None
    for at in torch.argsort(gain, descending=True, stable=True)[:TRIED].tolist():
        # Whoever leaves in turn costs something, so the gain bounds what an exchange can save.
        if -float(gain[at]) >= best:
            break
        cost = torch.stack([back.costs_after(at) for back in returns]).sum(0)
        cost = torch.where(kept, cost, torch.inf)
        leaver = int(cost.argmin())
        net = float(cost[leaver] - gain[at])
        if net < best:
            best, pair = net, (int(lost[at]), leaver)
    return pair


class _Returns:
    """What a reader's error would be if one of the lost channels came back."""

    def __init__(self, view: _View, lost: Tensor) -> None:
        reader = view.reader
        table = reader.table.to(lost.device)[lost]
        self.view = view
        self.real = table >= 0
        table = table.clamp(min=0)
        units, width = table.shape
        flat = table.reshape(-1)
        shape = (reader.hess.shape[0], -1, units, width)
        across = reader.hess[:, view.columns][:, :, flat]
        rest = (reader.lin[:, :, flat] - view.weight.mT @ across).reshape(shape)
        half = torch.linalg.solve_triangular(view.factor, across, upper=False)
        reach = torch.linalg.solve_triangular(view.factor.mT, half, upper=True)
        self.reach = reach.reshape(shape).movedim(2, 1) * self.real[:, None]
        # Squares of `half`, not `across' inverse across`: what is left after the subtraction may be tiny.
        half = half.reshape(shape).movedim(2, 1)
        own = reader.hess[:, table[:, :, None], table[:, None, :]] - half.mT @ half
        self.schur = _factor(own, self.real)
        self.rest = rest.movedim(1, 3) * self.real[:, :, None]
        self.gain = _energy(self.schur, self.rest @ self.rest.mT) * reader.share
        self.blocks, self.grams = _blocks(view.inverse, view.spots), _grams(view)

    def costs_after(self, at: int) -> Tensor:
        """Cost of losing each kept channel once the `at`-th lost one is back, (units,)."""
        view = self.view
        half = torch.linalg.solve_triangular(self.schur[:, at], self.reach[:, at].mT, upper=False)
        fresh = torch.cholesky_solve(self.rest[:, at], self.schur[:, at])
        spots = view.spots.clamp(min=0)
        real = (view.spots >= 0)[:, :, None]
        part = half.mT[:, spots] * real
        # With `reach @ fresh` taken off the weights, from their Grams as they were: outputs may be many.
        reach, along = self.reach[:, at][:, spots] * real, (view.weight @ fresh.mT)[:, spots] * real
        cross = along @ reach.mT
        grams = self.grams - cross - cross.mT + reach @ (fresh @ fresh.mT)[:, None] @ reach.mT
        return _energy(_factor(self.blocks + part @ part.mT, view.spots >= 0), grams) * view.reader.share


def _view(reader: Reader, kept: Tensor) -> _View:
    """Invert afresh on the channels that are left."""
    columns, spots = _places(reader, kept)
    left = reader.hess if len(columns) == reader.hess.shape[1] else among(reader.hess, columns)
    factor = torch.linalg.cholesky(left)
    inverse = torch.cholesky_inverse(factor)
    weight = inverse @ reader.lin.index_select(2, columns).mT
    return _View(reader, columns, spots, factor, inverse, weight)


def _places(reader: Reader, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns that are left, and the reader's table in terms of them, -1 for what is gone."""
    table = reader.table.to(kept.device)
    gone = table[~kept]
    stays = torch.ones(reader.hess.shape[1] + 1, dtype=torch.bool, device=kept.device)
    stays[gone.reshape(-1)] = False  # -1 hits the spare place at the end
    stays = stays[:-1]
    columns = stays.nonzero()[:, 0]
    place = torch.cat([torch.where(stays, stays.cumsum(0) - 1, -1), columns.new_full((1,), -1)])
    return columns, place[table]


def _without(view: _View, left: Tensor) -> _View:
    """Downdate in place after channels have left, all at once; their columns stay behind as zeros."""
    spots = view.spots[left]
    spots = spots[spots >= 0]
    if not len(spots):
        return view
    band = view.inverse[:, spots]
    factor = torch.linalg.cholesky(band[:, :, spots])
    half = torch.linalg.solve_triangular(factor, band, upper=False)
    step = torch.linalg.solve_triangular(factor, view.weight[:, spots], upper=False)
    view.inverse.baddbmm_(half.mT, half, alpha=-1)
    view.weight.baddbmm_(half.mT, step, alpha=-1)
    view.spots[left] = -1
    return view


def _blocks(matrices: Tensor, spots: Tensor) -> Tensor:
    """Return per channel the diagonal block of matrices (g, d, d), (g, units, widest, widest)."""
    spots = spots.clamp(min=0)
    return matrices[:, spots[:, :, None], spots[:, None, :]]


def _grams(view: _View) -> Tensor:
    """Return per channel the products of its columns' weights with each other, (g, units, widest, widest)."""
    weight = view.weight
    if view.spots.shape[1] == 1:
        squares = weight.square().sum(2)[:, view.spots.clamp(min=0)]
        return (squares * (view.spots >= 0)).unsqueeze(3)
    parts = weight[:, view.spots.clamp(min=0)]
    parts = parts * (view.spots >= 0)[:, :, None]
    grams: Tensor = parts @ parts.mT
    return grams


def _costs(view: _View) -> Tensor:
    """Rise of the reader's error if each channel were lost, (units,)."""
    factor = _factor(_blocks(view.inverse, view.spots), view.spots >= 0)
    return _energy(factor, _grams(view)) * view.reader.share


def _factor(blocks: Tensor, real: Tensor) -> Tensor:
    """Cholesky factors of (g, units, widest, widest) blocks, the identity where a channel has no column."""
    if blocks.shape[-1] == 1:
        return torch.where(real[:, :, None], blocks, 1.0).sqrt()
    both = real[:, :, None] & real[:, None, :]
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    factor: Tensor = torch.linalg.cholesky(torch.where(both, blocks, eye))
    return factor


def _energy(factor: Tensor, grams: Tensor) -> Tensor:
    """`tr(inv(block) gram)` summed over groups, (units,), from the blocks' Cholesky factors."""
    if factor.shape[-1] == 1:
        return (grams / factor.square())[..., 0, 0].sum(0)
    inner: Tensor = torch.cholesky_solve(grams, factor)
    return inner.diagonal(dim1=-2, dim2=-1).sum((0, 2))
