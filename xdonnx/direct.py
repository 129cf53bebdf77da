"""The error of one connection straight from a layer's columns, where three moments would cost too much.

Moments hold every connection at once: three products of size `d x d` per position. One connection alone needs one such
product, of the student's mixed input with itself; the other is of the teacher's output, which has far fewer rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xdonnx.columns import Geometry
from xdonnx.connection import Quadratic, damped
from xdonnx.crossval import Candidate
from xdonnx.moments import add_gram, lacks, mirrored, paired
from xdonnx.shelf import Chunks, lengths

# Multiply-accumulates of a layer's moments above which one connection is measured alone: seconds on a core.
DEAR = 1e11
# Positions that are looked at where an error is only to be shown.
SHOWN = 1024


class Seen(NamedTuple):
    """What a layer reads in the two networks, and what its output is added to.

    Parameters
    ----------
    teacher, student : chunks
    beside : (teacher, student) chunks or None
        The other branch of a residual block.
    geometry : Geometry
    """

    teacher: Chunks
    student: Chunks
    beside: tuple[Chunks, Chunks] | None
    geometry: Geometry

    def apart(self, count: int) -> tuple[Seen, Seen | None]:
        """Return the first so many chunks, and the others where there are any."""
        if len(self.teacher) <= count:
            return self, None
        parts = []
        for place in (slice(count), slice(count, None)):
            beside = None if self.beside is None else (self.beside[0][place], self.beside[1][place])
            parts.append(Seen(self.teacher[place], self.student[place], beside, self.geometry))
        return parts[0], parts[1]


def blended(own: Quadratic, other: Quadratic, share: float) -> Quadratic:
    """Return the error on both, the second with this share of the weight of the first; as `Fold.and_share` does."""
    ours, theirs = 1 / (1 + share), share / (1 + share)
    parts = ((own.hess, other.hess), (own.lin, other.lin), (own.const, other.const))
    return Quadratic(*(ours * a + theirs * b for a, b in parts))


def dear(columns: int, positions: int) -> bool:
    """Return whether a layer's moments over so many positions would take too long."""
    return 2 * positions * columns**2 > DEAR


def measure_directly(
    seen: Seen, candidate: Candidate, teacher: Tensor, *, bias: bool, each: int, dtype: torch.dtype
) -> Quadratic:
    """Return the error of the student's weights under one connection and ridge.

    Parameters
    ----------
    seen : Seen
    candidate : (Connection, float)
    teacher : (g, o, d)
        The teacher's weights, with the bias as last column where `bias` says so.
    bias, each, dtype
        As in :func:`xdonnx.moments.measure`.

    Returns
    -------
    Quadratic
        What :func:`xdonnx.connection.objective`, `compensated` and `damped` make of the moments.
    """
    connection, ridge = candidate
    lacking, weights = lacks(seen.beside), teacher.to(dtype)
    g, o, d = teacher.shape
    hess, lin, const = (teacher.new_zeros(shape) for shape in ((g, d, d), (g, o, d), (g,)))
    count = 0
    for x_t, x_s, part in paired(seen.teacher, seen.student, seen.geometry, bias=bias, each=each, dtype=dtype):
        missing = None if lacking is None else part.outputs(lacking, seen.geometry).to(dtype)
        count += x_t.shape[2]
        for weight, (a_t, a_s), (b_t, b_s) in connection.terms:
            own = mix(x_t, x_s, b_t, b_s)
            wanted = weights @ mix(x_t, x_s, a_t, a_s)
            if missing is not None:
                wanted += (a_t - b_t) * missing
            # Summed in float64 whatever the precision of the products.
            add_gram(hess, own, weight)
            lin += weight * (wanted @ own.mT)
            const += weight * wanted.double().square().sum((1, 2))
    hess = mirrored(hess.div_(count))
    return damped(Quadratic(hess, lin / count, const / count), teacher, ridge, bias=bias)


def missed(seen: Seen, teacher: Tensor, tried: Sequence[Tensor], *, bias: bool) -> list[float]:
    """Return the error of some weights, each network on its own input, as a share of the teacher's output energy.

    Parameters
    ----------
    seen, teacher, bias
        As in `measure_directly`.
    tried : sequence of (g, o, d)

    Returns
    -------
    list of float
        From so many positions as tell the error to a few percent.
    """
    lacking, whole = lacks(seen.beside), teacher.float()
    each = -(-SHOWN // max(1, sum(lengths(seen.teacher))))
    energy, wrong = 0.0, [0.0] * len(tried)
    for x_t, x_s, part in paired(seen.teacher, seen.student, seen.geometry, bias=bias, each=each, dtype=torch.float32):
        wanted = whole @ x_t
        energy += float(wanted.double().square().sum())
        if lacking is not None:
            wanted += part.outputs(lacking, seen.geometry).float()
        for at, weights in enumerate(tried):
            wrong[at] += float((wanted - weights.float() @ x_s).double().square().sum())
    return [one / max(energy, 1e-30) for one in wrong]


def mix(x_t: Tensor, x_s: Tensor, teacher: float, student: float) -> Tensor:
    """Return what a network reads that mixes both inputs; its shares sum to one."""
    if x_t is x_s or not student:
        return x_t
    return x_s if not teacher else torch.lerp(x_t, x_s, student)
