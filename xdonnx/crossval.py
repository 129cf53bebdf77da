"""Connection and ridge of a layer, chosen on samples that its fit did not see.

Moments add up, so those of all folds but one need no further pass over the samples, and a candidate's held-out error is
a refit and a few products of matrices. The support is the same for all candidates, and what is compared
is the refit. A caveat: layers further up were fitted on all samples, so the student's inputs of a held-out fold are a
little better than those of an unseen sample; hence `lean`, the advantage that a candidate needs over the first one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from xdonnx.columns import Geometry
from xdonnx.connection import (
    Connection,
    Projected,
    Quadratic,
    compensated,
    damped,
    mean_curvature,
    mixed_curvature,
    objective,
    projected,
    regression,
    restricted,
)
from xdonnx.moments import Missing, Moments, measure, measure_missing
from xdonnx.shelf import Chunks, Rows, alike, lengths
from xdonnx.solve import refit

Candidate = tuple[Connection, float]
"""A connection and a ridge."""


@dataclass(frozen=True, eq=False)
class Fold:
    """What one part of the samples says of a layer.

    Parameters
    ----------
    moments : Moments
    missing : Missing or None
        Of the other branch, see :func:`xdonnx.moments.measure_missing`.
    known : Projected, optional
        The teacher's weights times the moments, from `with_teacher`.
    curvatures : (tt, ts, ss) of (g, 1), optional
        The mean diagonals of the moments, where only some of their columns are left.
    """

    moments: Moments
    missing: Missing | None
    known: Projected | None = None
    curvatures: tuple[Tensor, Tensor, Tensor] | None = None

    def __add__(self, other: Fold) -> Fold:
        moments = self.moments + other.moments
        share = self.moments.count / moments.count

        def merged(mine: Iterable[Tensor], theirs: Iterable[Tensor]) -> list[Tensor]:
            return [a * share + b * (1 - share) for a, b in zip(mine, theirs, strict=True)]

        none = self.missing is None or other.missing is None
        unknown = self.known is None or other.known is None
        whole = self.curvatures is None or other.curvatures is None
        curvatures = None if whole else tuple(merged(self.curvatures or (), other.curvatures or ()))
        return Fold(
            moments,
            None if none else Missing(*merged(self.missing or (), other.missing or ())),
            None if unknown else Projected(*merged(self.known or (), other.known or ())),
            None if curvatures is None else (curvatures[0], curvatures[1], curvatures[2]),
        )

    def with_teacher(self, teacher: Tensor) -> Fold:
        """Return the fold with what all connections need of the teacher's weights (g, o, d), computed once."""
        return replace(self, known=projected(self.moments, teacher))

    def and_share(self, other: Fold | None, share: float) -> Fold:
        """Return both together, the other one with this share of the weight that this one has."""
        if other is None or not share:
            return self
        # Only the proportion of the counts matters.
        count = round(share * self.moments.count) or 1
        return self + replace(other, moments=replace(other.moments, count=count))

    def quadratic(self, candidate: Candidate, teacher: Tensor, *, bias: bool) -> Quadratic:
        """Return the error of the student's weights under a connection and a ridge."""
        connection, ridge = candidate
        q = objective(connection, self.moments, teacher, self.known)
        if self.missing is not None:
            q = compensated(q, connection, self.missing, teacher)
        mixed = None if self.curvatures is None else mixed_curvature(connection, self.curvatures)
        return damped(q, teacher, ridge, bias=bias, curvature=mixed)

    def restricted(self, columns: Tensor, *, bias: bool) -> Fold:
        """Return what the fold says of some columns (d,) alone, the others held at zero: all but the constants.

        Products with `teacher` have to be known; they are of all its columns.
        """
        if bool(columns.all()):
            return self
        assert self.known is not None, "products with all of the teacher's columns cannot be had from some of them"

        def both(matrix: Tensor) -> Tensor:
            return matrix[:, columns][:, :, columns]

        tt, ts, ss = self.moments.tt, self.moments.ts, self.moments.ss
        curvatures = tuple(mean_curvature(matrix, bias=bias) for matrix in (tt, ts, ss))
        small = both(tt)
        agree = tt is ss
        moments = Moments(small, small if agree else both(ts), small if agree else both(ss), self.moments.count)
        known = [matrix[..., columns] for matrix in self.known]
        missing = None
        if self.missing is not None:
            teacher, student, energy = self.missing
            missing = Missing(teacher[..., columns], student[..., columns], energy)
        return Fold(moments, missing, Projected(*known), (curvatures[0], curvatures[1], curvatures[2]))


def measure_folds(
    teacher: Chunks,
    student: Chunks,
    beside: tuple[Chunks, Chunks] | None,
    geometry: Geometry,
    *,
    bias: bool,
    rows: int,
    samples: int,
    folds: int,
    each: int = 0,
    dtype: torch.dtype = torch.float64,
) -> list[Fold]:
    """Measure a layer's inputs fold by fold.

    Parameters
    ----------
    teacher, student : chunks of rows
        Row `r` of all is a view of sample `r % samples`; all views of a sample are in one fold.
    beside : (teacher, student), optional
        The other branch of a residual block.
    rows, samples, folds : int
        One fold where chunks do not hold `rows` rows in all: the first axis is not that of the samples then.
    each, dtype
        As in :func:`xdonnx.moments.measure`.

    Returns
    -------
    list of Fold
        At most `folds`, none of them empty.
    """
    folds = max(1, min(folds, samples)) if sum(lengths(teacher)) == rows else 1
    owners = torch.arange(sum(lengths(teacher))) % samples % folds
    found = []
    for fold in range(folds):
        places = [row.nonzero().flatten() for row in torch.split(owners == fold, lengths(teacher))]

        def part(chunks: Chunks, places: list[Tensor] = places) -> Chunks:
            return chunks if folds == 1 else Rows(chunks, places)

        if not any(map(len, places)):
            continue
        x_t = part(teacher)
        x_s = x_t if alike(teacher, student) else part(student)
        moments = measure(x_t, x_s, geometry, bias=bias, each=each, dtype=dtype)
        missing = None
        if beside is not None and not alike(*beside):
            others = (part(beside[0]), part(beside[1]))
            missing = measure_missing(x_t, x_s, others, geometry, bias=bias, each=each, dtype=dtype)
        found.append(Fold(moments, missing))
    return found


def total(folds: Sequence[Fold]) -> Fold:
    """Return what all folds together say."""
    return reduce(add, folds)


def choose(
    folds: Sequence[Fold],
    candidates: Sequence[Candidate],
    teacher: Tensor,
    mask: Tensor,
    columns: Tensor,
    *,
    bias: bool,
    lean: float,
    pool: Fold | None = None,
    shares: Sequence[float] = (0.0,),
) -> int:
    """Return the index of the candidate whose refit has the least error on folds that it did not see.

    Parameters
    ----------
    candidates : sequence of (Connection, float)
    teacher : (g, o, d)
        The teacher's weights, pulled towards and imitated.
    mask : BoolTensor (g, o, d)
        The weights that stay.
    columns : BoolTensor (d,)
        Columns that are not wholly gone; the others are left out of the systems.
    bias : bool
        Whether the last column is the bias.
    lean : float
        By what share a candidate has to be better than the first.
    pool : Fold, optional
        Of rows that are fitted besides and never judge.
    shares : sequence of float
        The weight of the pool for each candidate, or for all of them; see `Fold.and_share`.

    Returns
    -------
    int
        0 where there are no two folds.
    """
    if len(folds) < 2:
        return 0
    errors = torch.zeros(len(candidates), dtype=torch.float64)

    # What is gone is gone for all candidates: systems of half the columns cost a quarter.
    def left(fold: Fold) -> Fold:
        return (fold if fold.known else fold.with_teacher(teacher)).restricted(columns, bias=bias)

    parts, aside = [left(fold) for fold in folds], None if pool is None else left(pool)
    kept, toward = mask[..., columns], teacher[..., columns]
    for at, unseen in enumerate(folds):
        seen = total([part for other, part in enumerate(parts) if other != at])
        judge = restricted(unseen.quadratic((regression(), 0.0), teacher, bias=bias), columns)
        for index, candidate in enumerate(candidates):
            fitted = seen.and_share(aside, shares[min(index, len(shares) - 1)])
            found = refit(fitted.quadratic(candidate, toward, bias=bias), kept, toward)
            errors[index] += float(judge(found)) * unseen.moments.count
    best = int(errors.argmin())
    return best if float(errors[best]) < (1 - lean) * float(errors[0]) else 0
