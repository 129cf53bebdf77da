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
    objective,
    projected,
    regression,
    restricted,
)
from xdonnx.moments import Missing, Moments, measure, measure_missing
from xdonnx.solve import refit

Chunks = Sequence[Tensor]
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
    """

    moments: Moments
    missing: Missing | None
    known: Projected | None = None

    def __add__(self, other: Fold) -> Fold:
        moments = self.moments + other.moments
        share = self.moments.count / moments.count

        def merged(mine: Iterable[Tensor], theirs: Iterable[Tensor]) -> list[Tensor]:
            return [a * share + b * (1 - share) for a, b in zip(mine, theirs, strict=True)]

        none = self.missing is None or other.missing is None
        unknown = self.known is None or other.known is None
        return Fold(
            moments,
            None if none else Missing(*merged(self.missing or (), other.missing or ())),
            None if unknown else Projected(*merged(self.known or (), other.known or ())),
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
        return damped(q, teacher, ridge, bias=bias)


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
    folds = max(1, min(folds, samples)) if sum(map(len, teacher)) == rows else 1
    owners, start = [], 0
    for chunk in teacher:
        owners.append(torch.arange(start, start + len(chunk), device=chunk.device) % samples % folds)
        start += len(chunk)
    found = []
    for fold in range(folds):

        def part(chunks: Chunks, fold: int = fold) -> list[Tensor]:
            if folds == 1:
                return list(chunks)
            # A graph of fixed batch has chunks of one fold alone.
            return [chunk[row == fold] for chunk, row in zip(chunks, owners, strict=True) if bool((row == fold).any())]

        x_t = part(teacher)
        if not x_t:
            continue
        agree = all(a is b for a, b in zip(teacher, student, strict=True))
        x_s = x_t if agree else part(student)
        moments = measure(x_t, x_s, geometry, bias=bias, each=each, dtype=dtype)
        missing = None
        if beside is not None and not all(a is b for a, b in zip(*beside, strict=True)):
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
    for at, unseen in enumerate(folds):
        seen = total([fold for other, fold in enumerate(folds) if other != at])
        judge = restricted(unseen.quadratic((regression(), 0.0), teacher, bias=bias), columns)
        for index, candidate in enumerate(candidates):
            fitted = seen.and_share(pool, shares[min(index, len(shares) - 1)])
            q = fitted.quadratic(candidate, teacher, bias=bias)
            found = refit(restricted(q, columns), mask[..., columns], teacher[..., columns])
            errors[index] += float(judge(found)) * unseen.moments.count
    best = int(errors.argmin())
    return best if float(errors[best]) < (1 - lean) * float(errors[0]) else 0
