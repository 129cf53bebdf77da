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

from xdonnx.columns import Geometry, among
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
)
from xdonnx.moments import Missing, Moments, Sums, lacks, paired
from xdonnx.shelf import Chunks, lengths
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

        places = columns.nonzero()[:, 0]

        def both(matrix: Tensor) -> Tensor:
            return among(matrix, places)

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
    owners = torch.split(torch.arange(sum(lengths(teacher))) % samples % folds, lengths(teacher))
    sums, lacking = [Sums() for _ in range(folds)], lacks(beside)
    for x_t, x_s, part in paired(teacher, student, geometry, bias=bias, each=each, dtype=dtype):
        missing = None if lacking is None else part.outputs(lacking, geometry).to(dtype)
        own = owners[part.chunk][part.shots]
        for fold in sorted(set(own.tolist())):
            # Unrolled once for all folds: an image has far more values than are looked at.
            picked = (own == fold).nonzero()[:, 0].to(x_t.device)
            seen = _of_shots(x_t, picked, len(own))
            other = seen if x_s is x_t else _of_shots(x_s, picked, len(own))
            sums[fold].add(seen, other)
            if missing is not None:
                sums[fold].add_missing(seen, other, _of_shots(missing, picked, len(own)))
    found = [one for one in sums if one.count] or sums[:1]
    return [Fold(one.moments(), one.missing()) for one in found]


def _of_shots(block: Tensor, picked: Tensor, count: int) -> Tensor:
    """Return the positions that some of so many shots have in a block (g, d, positions)."""
    if len(picked) == count:
        return block
    return block.reshape(*block.shape[:2], count, -1).index_select(2, picked).flatten(2)


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
    for at, unseen in enumerate(parts):
        seen = total([part for other, part in enumerate(parts) if other != at])
        whole = folds[at].quadratic((regression(), 0.0), teacher, bias=bias)
        judge = Quadratic(unseen.moments.ss, whole.lin[..., columns], whole.const)
        for alike_ones in _alike(candidates, shares):
            problems = []
            for index in alike_ones:
                fitted = seen.and_share(aside, shares[min(index, len(shares) - 1)])
                problems.append(fitted.quadratic(candidates[index], toward, bias=bias))
            # One H, one factor, as many right sides as candidates.
            lin = torch.cat([q.lin for q in problems], 1)
            many = (kept.repeat(1, len(problems), 1), toward.repeat(1, len(problems), 1))
            found = refit(Quadratic(problems[0].hess, lin, problems[0].const), *many)
            for index, weights in zip(alike_ones, found.chunk(len(problems), 1), strict=True):
                errors[index] += float(judge(weights)) * unseen.moments.count
    best = int(errors.argmin())
    return best if float(errors[best]) < (1 - lean) * float(errors[0]) else 0


def _alike(candidates: Sequence[Candidate], shares: Sequence[float]) -> list[list[int]]:
    """Return the candidates, by their places, together where H is the same for them."""
    groups: dict[object, list[int]] = {}
    for index, (connection, ridge) in enumerate(candidates):
        share = shares[min(index, len(shares) - 1)]
        groups.setdefault((tuple((weight, own) for weight, _, own in connection.terms), ridge, share), []).append(index)
    return list(groups.values())
