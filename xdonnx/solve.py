"""Minimise a layer's quadratic error with part of its weights gone.

Every solver is a callable `(q, start, structure, keep) -> Solution`: deterministic, in float64, on whatever
device `q` lives. None sees an image, so the cost does not grow with the number of shots. Dimensions: see `moments`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from xdonnx.connection import Quadratic, damped, restricted
from xdonnx.descent import Adam, Descent
from xdonnx.errors import JobError
from xdonnx.removal import WIDE, Reader, choose
from xdonnx.structure import Channel, Structure

BATCH_BYTES = 256 * 2**20
"""Memory that refit may spend on the systems of a batch of rows."""


@dataclass(frozen=True, eq=False)
class Solution:
    """Weights with some of their units gone.

    Parameters
    ----------
    weight : Tensor (g, o, d), float64
        Zero wherever `mask` is False.
    mask : BoolTensor (g, o, d)
        The weights that stay.
    objective : float
        `q(weight)`.
    steps : int
        Iterations (or removals and exchanges) that were made.
    converged : bool
        Whether the solver stopped because it had arrived, not because its steps ran out.
    """

    weight: Tensor
    mask: Tensor
    objective: float
    steps: int
    converged: bool


class Solver(Protocol):
    """Chooses which units stay and what their weights become."""

    def __call__(self, q: Quadratic, start: Tensor, structure: Structure, keep: int) -> Solution:
        """Keep `keep` units of `structure`, beginning at `start` (g, o, d), so that `q` is small."""
        ...


def refit(q: Quadratic, mask: Tensor, start: Tensor) -> Tensor:
    """Best weights with a given support: exact least squares.

    Parameters
    ----------
    mask : BoolTensor (g, o, d)
        The weights that may differ from zero.
    start : (g, o, d)
        Decides where the minimum is not unique (more unknowns than shots, no ridge): the nearest is taken.

    Returns
    -------
    Tensor (g, o, d), float64
    """
    kept = torch.where(mask, start.to(q.hess), 0.0)
    if len(mask) > 1 or bool(mask[0, 0].all()) or not bool((mask == mask[:, :1]).all()):
        return _settle(q, kept, mask)
    # One support for all rows: the columns that are gone need not be carried along.
    alive = mask[0, 0]
    kept[..., alive] = _settle(restricted(q, alive), kept[..., alive], mask[..., alive])
    return kept


@dataclass(frozen=True)
class PGD:
    """Proximal gradient descent from the teacher's weights, the solver of Cross Distillation [1]_.

    Parameters
    ----------
    iterations : int
        The first third approaches the target, the rest fits the units that are left.
    optimizer : {'adam', 'gradient'}
        'gradient' steps by `1 / (2 * largest eigenvalue)` and ignores `rate`.
    rate : float
        Learning rate of Adam, on the error averaged over outputs and positions.
    ramp : {'kept', 'lambda'}
        'kept': what the published code does: the number of units kept falls linearly, the others are set to zero
        and never come back; nothing is shrunk. 'lambda': what the text says: soft thresholds, rising strength.
    slow : float, optional
        Factor on the rate once the units are settled. Default: 0.1 for channels, 1 for weights, as in the code.
    freeze_bias : bool
        The last column is a bias and keeps its start value, as in the code.
    refit : bool
        End with exact least squares on the units that are left, which neither the text nor the code does.
    single : bool
        Make Adam's steps in float32, as the code does: half the time, and the error at the end the same to four digits.

    Notes
    -----
    The text leaves the growth of the threshold open. Here it is, in each step, the smallest that leaves no more
    units than the linear ramp of 'kept' allows, and never less than in the step before; after the ramp the largest
    units are projected onto and the shrinkage ends.

    References
    ----------
    .. [1] Bai et al., "Few Shot Network Compression via Cross Distillation", AAAI 2020. arXiv:1911.09450
    """

    iterations: int = 3000
    optimizer: str = "adam"
    rate: float = 1e-3
    ramp: str = "kept"
    slow: float | None = None
    freeze_bias: bool = False
    refit: bool = True
    single: bool = False

    def __post_init__(self) -> None:
        _check_choice("optimizer", self.optimizer, ("adam", "gradient"))
        _check_choice("ramp", self.ramp, ("kept", "lambda"))
        _check_steps(self.iterations)

    def __call__(self, q: Quadratic, start: Tensor, structure: Structure, keep: int) -> Solution:
        """See `Solver`."""
        structure.check(keep)
        start = start.to(q.hess)
        mask = torch.ones_like(start, dtype=torch.bool)
        movable = mask.clone()
        if self.freeze_bias:
            movable[:, :, -1] = False
        if keep == structure.count and self.refit:
            return _solution(q, _settle(q, start, movable), mask, 0, True)
        now = self._walker(q, start, structure, ~movable[0, 0])
        third, strength, left = self.iterations // 3, 0.0, structure.count
        late, checkpoint = self.iterations - max(1, self.iterations // 10), torch.inf
        for t in range(self.iterations):
            if t == late:
                checkpoint = float(q(now.weight))
            now.step(t)
            if t > third:
                continue
            target = keep + (structure.count - keep) * (third - t) // third if third else keep
            if self.ramp == "lambda":
                strength = max(strength, _threshold(structure.scores(now.weight), target))
                now.move(structure.prox(now.weight, strength))
            # The same units are left until fewer may be.
            if (self.ramp == "kept" and target < left) or t == third:
                mask, left = structure.project(now.weight, target), target
                now.keep(mask)
        w = now.weight
        error = float(q(w))
        if self.refit:
            w = _settle(q, w, mask & movable)
        return _solution(q, w, mask, self.iterations, checkpoint - error <= 1e-3 * abs(checkpoint))

    def _walker(self, q: Quadratic, w: Tensor, structure: Structure, frozen: Tensor) -> Adam | Descent:
        if self.optimizer == "gradient":
            return Descent(q.hess, q.lin, w, frozen)
        slow = self.slow if self.slow is not None else 0.1 if isinstance(structure, Channel) else 1.0
        dtype = torch.float32 if self.single else torch.float64
        after = self.iterations // 3 + 1
        return Adam(q.hess, q.lin, w, frozen, rate=self.rate, slow=slow, after=after, dtype=dtype)


@dataclass(frozen=True)
class ADMM:
    """Alternate between the error, which is quadratic, and the structure, which is a projection.

    Parameters
    ----------
    iterations : int
        At most; ends when the support stands still.
    rho : float
        First penalty on the distance between the two, relative to a unit diagonal of H.
    ramp : int
        Iterations over which the number of kept units falls to the target, at most half of all;
        0 projects onto the target at once.
    refit : bool
        End with exact least squares on the support.

    Notes
    -----
    After ALPS [1]_: columns are scaled to a unit diagonal of H, so that a weight's size says what it contributes,
    and rho grows faster while the support still moves much. One eigendecomposition serves every rho.

    References
    ----------
    .. [1] Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
       Models", NeurIPS 2024. arXiv:2406.07831
    """

    iterations: int = 300
    rho: float = 0.01
    ramp: int = 30
    refit: bool = True

    def __post_init__(self) -> None:
        _check_steps(self.iterations)
        if not self.rho > 0:
            raise JobError(f"rho is {self.rho}.\n  It is a penalty: above 0, such as 0.1.")

    def __call__(self, q: Quadratic, start: Tensor, structure: Structure, keep: int) -> Solution:
        """See `Solver`."""
        structure.check(keep)
        start = start.to(q.hess)
        if keep == structure.count:
            mask = torch.ones_like(start, dtype=torch.bool)
            return _solution(q, refit(q, mask, start) if self.refit else start, mask, 0, True)
        scale = q.hess.diagonal(dim1=1, dim2=2).sqrt()[:, None]
        scale = torch.where(scale > 0, scale, 1.0)
        lin = q.lin / scale
        values, vectors = torch.linalg.eigh(q.hess / (scale * scale.mT))
        rho, dual, quiet, step = self.rho, torch.zeros_like(start), 0, 0
        ramp = min(self.ramp, self.iterations // 2)
        sparse = start * scale
        mask = structure.project(sparse, _falling(structure.count, keep, 0, ramp))
        sparse, anchor = sparse * mask, mask
        for step in range(1, self.iterations + 1):
            dense = ((lin - dual + rho * sparse) @ vectors / (values[:, None] + rho)) @ vectors.mT
            target = _falling(structure.count, keep, step, ramp)
            aim = dense + dual / rho
            mask = structure.project(aim, target)
            sparse = aim * mask
            dual += rho * (dense - sparse)
            if step % 3 == 0 and step > ramp:
                moved = int((mask ^ anchor).sum()) / 2
                anchor = mask
                quiet = 0 if moved else quiet + 1
                if quiet == 3:
                    break
                share = moved / int(mask.sum())
                # Slower than in the paper: few shots make H ill-conditioned, and a support frozen early is a bad one.
                rho *= 1.1 if share > 0.1 else 1.05 if share > 0.005 else 1.03
        weight = sparse / scale
        if self.refit:
            weight = refit(q, mask, weight)
        return _solution(q, weight, mask, step, quiet == 3)


@dataclass(frozen=True)
class Greedy:
    """Remove the channel that is missed least, let the others adapt, repeat; then exchange.

    Parameters
    ----------
    swaps : int
        Exchanges of a lost for a kept channel at most, after the removals.

    Notes
    -----
    Costs are exact in every step (see `removal`), so the order is that of refitting after each removal.
    """

    swaps: int = 16

    def __call__(self, q: Quadratic, start: Tensor, structure: Structure, keep: int) -> Solution:
        """See `Solver`."""
        if not isinstance(structure, Channel):
            raise JobError(
                "the greedy solver removes whole channels, and this job removes single weights.\n"
                "  Use solver admm or pgd, or structure channel."
            )
        structure.check(keep)
        start = start.to(q.hess)
        kept, steps = choose([_reader(q, start, structure, structure.count)], keep, self.swaps)
        mask = structure.spread(kept, start)
        weight = refit(q, mask, start)
        # At a minimum over its support `<W H, W>` is `<C, W>`.
        return Solution(weight, mask, float(q.const.sum() - (q.lin * weight).sum()), steps, True)


def remove_jointly(
    problems: Sequence[tuple[Quadratic, Tensor, Channel]], keep: int, *, swaps: int = 0, rough: bool = False
) -> Tensor:
    """Channels to keep when several layers read the same ones.

    Parameters
    ----------
    problems : sequence of (error, weights to start from (g, o, d), columns)
        One per layer; unit numbers mean the same channel everywhere, and a layer may lack columns for some.
    keep
        Channels that stay.
    swaps
        Exchanges of a lost for a kept channel at most, after the removals.
    rough
        Let a quarter of the channels go at once, by costs in float32; the errors are damped already.

    Returns
    -------
    BoolTensor (units,)

    Notes
    -----
    A channel costs the sum over layers of the rise in error, each as a share of what that layer's teacher puts
    out; else a layer with large activations would decide alone.
    """
    units = max(channel.count for _, _, channel in problems)
    if not 1 <= keep <= units:
        raise JobError(f"cannot keep {keep} of {units} channels.\n  Keep at least 1 and at most {units}.")
    readers = [_reader(q, start.to(q.hess), channel, units, damp=not rough) for q, start, channel in problems]
    return choose(readers, keep, swaps, rough=rough)[0]


def _solution(q: Quadratic, weight: Tensor, mask: Tensor, steps: int, converged: bool) -> Solution:
    return Solution(weight, mask, float(q(weight)), steps, converged)


def _settle(q: Quadratic, w: Tensor, movable: Tensor) -> Tensor:
    """Minimise over the `movable` weights and leave the others as they are in `w`."""
    slack = q.lin - w @ q.hess
    if bool(movable.all()):
        return w + _minimum(q.hess, slack)
    g, o, d = w.shape
    if bool((movable == movable[:, :1]).all()):
        # All rows of a group share a support, so one factor serves them.
        support, group = movable[:, 0], torch.arange(g, device=w.device)
    else:
        support, slack = movable.reshape(g * o, d), slack.reshape(g * o, 1, d)
        group = torch.arange(g, device=w.device).repeat_interleave(o)
    move = torch.zeros_like(slack)
    sizes = support.sum(1)
    order = torch.argsort(sizes, stable=True)
    # Neighbours in this order need little padding.
    widths = sizes[order].tolist()
    begin = 0
    while begin < len(widths):
        end = begin + 1
        while end < len(widths) and (end + 1 - begin) * widths[end] ** 2 * 8 <= BATCH_BYTES:
            end += 1
        if width := widths[end - 1]:
            batch = order[begin:end]
            spots = torch.argsort(~support[batch], dim=1, stable=True)[:, :width]
            real = support[batch].gather(1, spots)
            hess = q.hess[group[batch][:, None, None], spots[:, :, None], spots[:, None, :]]
            right = slack[batch].gather(2, spots[:, None].expand(-1, slack.shape[1], -1)) * real[:, None]
            found = _minimum(hess, right, real)
            move[batch] = move[batch].scatter(2, spots[:, None].expand_as(found), found)
        begin = end
    return w + move.reshape(w.shape)


def _minimum(hess: Tensor, right: Tensor, real: Tensor | None = None) -> Tensor:
    """Solve `x @ hess = right` for symmetric (b, k, k) and (b, r, k); where `real` (b, k) is False, x is zero."""
    both = None if real is None else real[:, :, None] & real[:, None, :]
    eye = torch.eye(hess.shape[1], dtype=hess.dtype, device=hess.device)
    posed = hess if both is None else torch.where(both, hess, eye)
    factor, failed = torch.linalg.cholesky_ex(posed)
    x = torch.cholesky_solve(right.mT, factor).mT
    bad = (failed > 0) | _near_singular(factor, posed, hess.shape[1] * torch.finfo(hess.dtype).eps)
    if bool(bad.any()):
        # Zero instead of the identity in the padding: zero eigenvalues are dropped below.
        values, vectors = torch.linalg.eigh(hess[bad] if both is None else hess[bad] * both[bad])
        floor = values[:, -1:] * hess.shape[1] * torch.finfo(hess.dtype).eps
        inverse = torch.where(values > floor, 1 / values, 0.0)
        x[bad] = ((right[bad] @ vectors) * inverse[:, None]) @ vectors.mT
    return x if real is None else x * real[:, None]


def _near_singular(factor: Tensor, matrix: Tensor, floor: float) -> Tensor:
    """Whether a pivot of Cholesky factors (b, k, k) of matrices is less than that share of their diagonal, (b,)."""
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    return (pivots.square() <= matrix.diagonal(dim1=-2, dim2=-1) * floor).any(-1)


def _reader(q: Quadratic, start: Tensor, channel: Channel, units: int, *, damp: bool = True) -> Reader:
    """Layer as `removal` wants it: positive definite, its error a share of the teacher's energy."""
    # Costs need an inverse. This pull only breaks ties among weights that fit the shots equally well.
    if damp and q.hess.shape[1] <= WIDE:
        factor, failed = torch.linalg.cholesky_ex(q.hess)
        if bool(((failed > 0) | _near_singular(factor, q.hess, 1e-9)).any()):
            q = damped(q, start, 1e-8, bias=False)
    missing = torch.full((units - channel.count, channel.table.shape[1]), -1, dtype=torch.long)
    table = torch.cat([channel.table, missing]).to(q.hess.device)
    energy = float(q.const.sum())
    hess, lin = q.hess, q.lin
    if bool((channel.columns >= 0).all()):
        # A reader may lose all that it reads. A column of its own that means nothing keeps its matrices from vanishing.
        hess, lin = functional.pad(hess, (0, 1, 0, 1)), functional.pad(lin, (0, 1))
        hess[:, -1, -1] = 1
    return Reader(hess, lin, table, 1 / energy if energy > 0 else 1.0)


def _threshold(scores: Tensor, keep: int) -> float:
    """Smallest strength at which at most `keep` units survive."""
    count = scores.numel()
    return float(scores.kthvalue(count - keep).values) if keep < count else 0.0


def _falling(count: int, keep: int, step: int, ramp: int) -> int:
    """Units to keep in a step of a ramp that falls fast at first and settles slowly."""
    return keep + int((count - keep) * max(0.0, 1 - step / ramp) ** 3) if step < ramp else keep


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise JobError(f"unknown {option} {value!r}.\n  Choose one of: {', '.join(choices)}.")


def _check_steps(iterations: int) -> None:
    if iterations < 1:
        raise JobError(f"iterations is {iterations}.\n  At least one is needed.")


SOLVERS: dict[str, Any] = {"pgd": PGD, "admm": ADMM, "greedy": Greedy}
