"""What a layer's inputs come down to: three matrices, whatever the number of shots. For dimensions see `columns`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from xdonnx.columns import Geometry, columns, grid, spread
from xdonnx.errors import ShotsError
from xdonnx.shelf import Chunks, alike


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of a layer's unrolled input in teacher (t) and student (s).

    Parameters
    ----------
    tt, ts, ss : Tensor (g, d, d), float64
        `ts[i, j]` is the mean over positions of `x_t[i] * x_s[j]`; in units of squared activation. The three
        are one tensor where the two networks still agree.
    count : int
        Positions that the mean was taken over, all shots together.
    """

    tt: Tensor
    ts: Tensor
    ss: Tensor
    count: int

    @cached_property
    def both(self) -> Tensor:
        """`ts + ts'`."""
        return self.ts + self.ts.mT

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        share = self.count / count

        def merge(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.lerp(theirs, mine, share)

        tt = merge(self.tt, other.tt)
        if self.tt is self.ss and other.tt is other.ss:
            return Moments(tt, tt, tt, count)
        return Moments(tt, merge(self.ts, other.ts), merge(self.ss, other.ss), count)


# Positions looked at for each unknown of a row, and at least: neighbours in an image say nearly the same. Rows of few
# unknowns, such as those of a depthwise layer, need fewer, and so do those of many, where none are cut into folds.
PER_COLUMN, FEWEST, AMPLE, LEAST = 4, 8192, 64, 1024
# Above so many columns a layer is not fitted fold by fold.
WIDEST_FOLDED = 700


def enough(columns: int, rows: int) -> int:
    """Return how many positions of each of so many rows say enough about a layer with so many columns.

    Parameters
    ----------
    columns : int
        Of one group; the unknowns of one output.
    rows : int

    Returns
    -------
    int
        At least 1.
    """
    few = FEWEST // 2 if columns > WIDEST_FOLDED else max(LEAST, min(FEWEST, AMPLE * columns))
    return -(-max(few, PER_COLUMN * columns) // max(1, rows))


def measure(
    teacher: Iterable[Tensor],
    student: Iterable[Tensor],
    geometry: Geometry,
    *,
    bias: bool,
    each: int = 0,
    columns_at_once: int = 8192,
    dtype: torch.dtype = torch.float64,
) -> Moments:
    """Moments of a layer's inputs, taken over every chunk.

    Parameters
    ----------
    teacher, student
        Inputs of the layer in the two networks, in chunks of any number of shots; chunk by chunk the same
        shots. Where both yield the same tensor object, its product is computed once.
    bias
        Append a row of ones, so that the layer's bias is a column like any other.
    each
        Positions of every shot that are looked at, spread evenly; 0, or as many as there are, means all.
    columns_at_once
        Positions that are unrolled at a time; what bounds the memory. A single shot is never split.
    dtype
        In which products are taken. The sum over chunks is float64 in any case.

    Returns
    -------
    Moments
        On the device of the chunks.

    Raises
    ------
    ShotsError
        If there is no chunk, or none holds a position.
    """
    sums = Sums()
    for x_t, x_s, _ in paired(teacher, student, geometry, bias=bias, each=each, at_once=columns_at_once, dtype=dtype):
        sums.add(x_t, x_s)
    return sums.moments()


class Missing(NamedTuple):
    """What another branch, which a layer's output is added to, lacks in the student: `m = s_T - s_S`.

    Parameters
    ----------
    teacher, student : (g, o, d)
        E[m x_T'] and E[m x_S'], with the layer's inputs in the two networks; float64.
    energy : (g,)
        E|m|^2, summed over outputs.
    """

    teacher: Tensor
    student: Tensor
    energy: Tensor


def measure_missing(
    teacher: Iterable[Tensor],
    student: Iterable[Tensor],
    beside: tuple[Chunks, Chunks],
    geometry: Geometry,
    *,
    bias: bool,
    each: int = 0,
    columns_at_once: int = 8192,
    dtype: torch.dtype = torch.float64,
) -> Missing | None:
    """Products of a layer's inputs with what another branch, which its output is added to, lacks in the student.

    Parameters
    ----------
    teacher, student, bias, each, columns_at_once, dtype
        As in `measure`.
    beside : (teacher, student)
        The other branch in the two networks, s_T and s_S, chunk by chunk of the output's shape.

    Returns
    -------
    Missing or None
        None where the other branch is the same in both networks.
    """
    lacking = lacks(beside)
    if lacking is None:
        return None
    sums = Sums()
    pairs = paired(teacher, student, geometry, bias=bias, each=each, at_once=columns_at_once, dtype=dtype)
    for x_t, x_s, part in pairs:
        sums.add_missing(x_t, x_s, part.outputs(lacking, geometry).to(dtype))
    return sums.missing()


def lacks(beside: tuple[Chunks, Chunks] | None) -> Callable[[int], Tensor] | None:
    """Return what gives, for each chunk, what another branch lacks in the student; None where that is nothing.

    Parameters
    ----------
    beside : (teacher, student) or None
        The branch in the two networks.
    """
    if beside is None or alike(*beside):
        return None
    # Blocks of one chunk follow each other, so that it is worth holding the last.
    return lru_cache(1)(lambda chunk: beside[0][chunk] - beside[1][chunk])


class Part(NamedTuple):
    """Which shots of which chunk a block of columns is of, and which of their positions; None means all."""

    chunk: int
    shots: slice
    places: Tensor | None

    def outputs(self, chunks: Callable[[int], Tensor], geometry: Geometry) -> Tensor:
        """Return what a layer puts out there, (g, o, positions), from what gives its outputs for each chunk."""
        found = chunks(self.chunk)[self.shots]
        flat = found.reshape(len(found), -1, found.shape[-1]).mT if geometry.op == "linear" else found.flatten(2)
        if self.places is not None:
            flat = flat.gather(2, self.places[:, None].expand(-1, flat.shape[1], -1))
        return flat.movedim(1, 0).reshape(geometry.groups, flat.shape[1] // geometry.groups, -1)


def paired(
    teacher: Iterable[Tensor],
    student: Iterable[Tensor],
    geometry: Geometry,
    *,
    bias: bool,
    each: int,
    at_once: int = 8192,
    dtype: torch.dtype,
) -> Iterator[tuple[Tensor, Tensor, Part]]:
    """Unroll both networks' inputs block by block; the same object twice where they are the same.

    Parameters
    ----------
    teacher, student, bias, each, dtype
        As in `measure`.
    at_once : int
        Positions of a block; a single shot is never split.

    Yields
    ------
    x_t, x_s : (g, d, positions)
    part : Part
    """
    first = 0
    for at, (chunk_t, chunk_s) in enumerate(zip(teacher, student, strict=True)):
        assert chunk_t.shape == chunk_s.shape, f"teacher {chunk_t.shape}, student {chunk_s.shape}"
        if not len(chunk_t):
            continue
        sizes = grid(chunk_t, geometry)
        places = None
        if each and each < prod(sizes):
            places = spread(sizes, len(chunk_t), each, first).to(chunk_t.device)
        first += len(chunk_t)
        step = max(1, at_once // max(1, prod(sizes) if places is None else each))
        for start in range(0, len(chunk_t), step):
            shots = slice(start, start + step)
            part = Part(at, shots, None if places is None else places[shots])
            x_t = columns(chunk_t[shots], geometry, part.places, bias=bias, dtype=dtype)
            x_s = x_t if chunk_t is chunk_s else columns(chunk_s[shots], geometry, part.places, bias=bias, dtype=dtype)
            yield x_t, x_s, part


def add_gram(total: Tensor, x: Tensor, weight: float = 1.0, block: int = 512) -> None:
    """Add `weight * x @ x'` to a total (g, d, d), in place: only the blocks on and above the diagonal."""
    for at in range(0, x.shape[1], block):
        total[:, at : at + block, at:].add_(x[:, at : at + block] @ x[:, at:].mT, alpha=weight)


def mirrored(total: Tensor, block: int = 512) -> Tensor:
    """Fill in what `add_gram` leaves out, in place, so that the matrices are symmetric to the last bit."""
    for at in range(0, total.shape[1], block):
        own = total[:, at : at + block, at : at + block]
        own.copy_(own.triu() + own.triu(1).mT)
        total[:, at + block :, at : at + block] = total[:, at : at + block, at + block :].mT
    return total


class _Sum:
    """A running sum of products in float64, whatever the precision of the products."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._upper_only = False

    def add(self, product: Tensor) -> None:
        """Add a whole matrix per group."""
        # float64: shots are few, so H is nearly singular and float32 loses the digits that refit lives on.
        if self._total is None:
            self._total = product.double()
        else:
            self._total += product

    def add_gram(self, x: Tensor) -> None:
        """Add `x @ x'`, of which only the blocks on and above the diagonal are computed."""
        g, d, _ = x.shape
        if self._total is None:
            self._total = x.new_zeros((g, d, d), dtype=torch.float64)
            self._upper_only = True
        add_gram(self._total, x)

    def mean(self, count: int) -> Tensor:
        """Sum over `count`, once; a sum of Grams comes out exactly symmetric."""
        assert self._total is not None
        mean = self._total.div_(count)
        return mirrored(mean) if self._upper_only else mean


class Sums:
    """Running sums of what moments, and what another branch lacks, are the means of; `count` positions so far."""

    def __init__(self) -> None:
        self.count = self._lacking = 0
        self._shared: _Sum | None = None
        self._apart: tuple[_Sum, _Sum, _Sum] | None = None
        self._missing: tuple[_Sum, _Sum, _Sum] | None = None

    def add(self, x_t: Tensor, x_s: Tensor) -> None:
        """Add a block of columns (g, d, positions); one product where both are the same tensor."""
        self.count += x_t.shape[2]
        if x_t is x_s:
            self._shared = self._shared or _Sum()
            self._shared.add_gram(x_t)
            return
        self._apart = self._apart or (_Sum(), _Sum(), _Sum())
        self._apart[0].add_gram(x_t)
        self._apart[1].add(x_t @ x_s.mT)
        self._apart[2].add_gram(x_s)

    def add_missing(self, x_t: Tensor, x_s: Tensor, missing: Tensor) -> None:
        """Add what the other branch lacks (g, o, positions) on a block of columns."""
        self._missing = self._missing or (_Sum(), _Sum(), _Sum())
        self._lacking += x_t.shape[2]
        self._missing[0].add(missing @ x_t.mT)
        self._missing[1].add(missing @ x_s.mT)
        self._missing[2].add(missing.double().square().sum((1, 2)))

    def moments(self) -> Moments:
        """Return the means, once; raises ShotsError where nothing was added."""
        if self.count == 0:
            raise ShotsError("no shot reached the layer: there is nothing to measure.\n  Pass at least one sample.")
        mean = None if self._shared is None else self._shared.mean(self.count)
        if self._apart is None:
            assert mean is not None
            return Moments(mean, mean, mean, self.count)
        totals = [part.mean(self.count) for part in self._apart]
        if mean is not None:
            totals = [total.add_(mean) for total in totals]
        return Moments(totals[0], totals[1], totals[2], self.count)

    def missing(self) -> Missing | None:
        """Return the means, once; None where none was added."""
        return None if self._missing is None else Missing(*(total.mean(self._lacking) for total in self._missing))
