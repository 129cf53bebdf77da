"""A layer's error behind the ReLU that reads it: what is below zero in both networks is no error.

Least squares before a ReLU spend weights on how negative an output is. With y the output that is wanted, u the
student's, and s and r what is added to either before the ReLU, the error here is (u + r - y - s)^2 where y + s is
positive, and max(u + r, 0)^2 elsewhere. That is convex in the weights, and the least-squares error toward
`where(y + s > 0, y + s - r, min(u, -r))` lies above it and touches it at u: so a few refits with the matrix of the
quadratic error, each onto such a target, go down to its minimum (He, Zhang, Sun, "Channel Pruning", ICCV 2017, treat
the ReLU likewise). Which weights stay is decided before.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from xdonnx.columns import grid
from xdonnx.connection import Quadratic, damped
from xdonnx.crossval import Candidate
from xdonnx.direct import Seen, mix
from xdonnx.moments import lacks, paired
from xdonnx.shelf import lengths
from xdonnx.solve import refit

# Refits, with Nesterov's momentum; more lower the error by under a hundredth.
STEPS = 8
# Bytes that a layer's columns may take here.
MOST_BYTES = 1 << 28


def positions(seen: Seen, each: int) -> int:
    """Return how many positions of a layer's input are looked at: `each` of every row, all where that is 0."""
    whole = prod(grid(seen.teacher[0], seen.geometry))
    return sum(lengths(seen.teacher)) * min(each or whole, whole)


def cost(mask: Tensor, positions: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the multiply-accumulates of a layer's refits, infinite where its columns would not fit.

    Parameters
    ----------
    mask : BoolTensor (g, o, d)
        The weights that stay.
    positions : int
    dtype
        Of the columns.
    """
    g, o, _ = mask.shape
    kept = mask.sum(2)
    width = int(mask.any(1).sum(1).max())
    if dtype.itemsize * g * positions * (width + 3 * o) > MOST_BYTES:
        return float("inf")
    same = bool((mask == mask[:, :1]).all())
    systems = float((kept[:, :1] if same else kept).double().pow(3).sum()) / 3
    return STEPS * (2.0 * g * o * positions * width + systems)


def rectified(
    seen: Seen,
    pool: tuple[Seen, float] | None,
    candidate: Candidate,
    teacher: Tensor,
    start: Tensor,
    mask: Tensor,
    *,
    summed: bool,
    bias: bool,
    each: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights whose outputs are close to the wanted ones after a ReLU.

    Parameters
    ----------
    seen : Seen
    pool : (Seen, float), optional
        Further rows and their weight, all together, against that of the others.
    candidate : (Connection, float)
        Of one term: what either network reads, and the pull toward the teacher's weights.
    teacher : (g, o, d)
        The teacher's weights, with the bias as last column where `bias` says so.
    start : (g, o, d)
        Weights of the least error before the ReLU.
    mask : BoolTensor (g, o, d)
        The weights that stay.
    summed : bool
        Whether `seen.beside` is added to the output before the ReLU.
    bias, each, dtype
        As in :func:`xdonnx.moments.measure`; without a ridge, float32 leaves noise that the refits go by.

    Returns
    -------
    Tensor (g, o, d), float64
    """
    connection, ridge = candidate
    ((weight, _, _),) = connection.terms
    alive = mask.any(1).any(0)
    share = 0.0 if pool is None else pool[1]
    how = (alive, summed, bias, each, dtype)
    parts = [_gathered(seen, candidate, teacher, weight / (1 + share), *how)]
    if pool is not None and share:
        parts.append(_gathered(pool[0], candidate, teacher, weight * share / (1 + share), *how))
    x, y, own = (torch.cat(list(found), 2) for found in zip(*parts, strict=True))
    toward, stays, now = teacher[..., alive], mask[..., alive], start[..., alive]
    flat = Quadratic((x @ x.mT).double(), torch.zeros_like(toward), toward.new_zeros(len(toward)))
    base = damped(flat, toward, ridge, bias=bias)
    positive, wanted = y > 0, y - own
    ahead = now
    for step in range(STEPS):
        made = ahead.to(dtype) @ x
        target = torch.where(positive, wanted, torch.minimum(made, -own))
        last, now = now, refit(Quadratic(base.hess, base.lin + (target @ x.mT).double(), base.const), stays, toward)
        ahead = now + step / (step + 3) * (now - last)
    found = torch.zeros_like(start)
    found[..., alive] = now
    return found


def _gathered(
    seen: Seen,
    candidate: Candidate,
    teacher: Tensor,
    weight: float,
    alive: Tensor,
    summed: bool,
    bias: bool,
    each: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the student's columns (g, d, p), what is wanted of the sum (g, o, p), and what it adds itself.

    All scaled, which a ReLU lets pass, so that sums over positions are means of this weight.
    """
    (_, (a_t, a_s), (b_t, b_s)), weights = candidate[0].terms[0], teacher.to(dtype)
    lacking = lacks(seen.beside)
    xs, ys, own = [], [], []
    for x_t, x_s, part in paired(seen.teacher, seen.student, seen.geometry, bias=bias, each=each, dtype=dtype):
        read = mix(x_t, x_s, b_t, b_s)[:, alive]
        wanted = weights @ mix(x_t, x_s, a_t, a_s)
        if lacking is not None:
            wanted += (a_t - b_t) * part.outputs(lacking, seen.geometry).to(dtype)
        added = torch.zeros_like(wanted)
        if summed and seen.beside is not None:
            theirs, ours = (part.outputs(side.__getitem__, seen.geometry).to(dtype) for side in seen.beside)
            added = mix(theirs, ours, b_t, b_s)
        xs.append(read)
        ys.append(wanted + added)
        own.append(added)
    x, y, added = (torch.cat(found, 2) for found in (xs, ys, own))
    scale = (weight / max(1, x.shape[2])) ** 0.5
    return x * scale, y * scale, added * scale
