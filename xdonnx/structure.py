"""What may vanish together: single weights, whole channels, or n of every m channels at one kernel offset.

A structure counts *units*. It scores them, keeps the largest (`project`, the nearest point), or shrinks them
(`prox`). Columns that belong to no unit, the bias above all, are never touched. Dimensions: see `moments`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from xdonnx.errors import JobError


class Structure(Protocol):
    """Units of a weight matrix `w` of shape (g, o, d)."""

    @property
    def count(self) -> int:
        """Number of units that may go."""
        ...

    @property
    def least(self) -> int:
        """The smallest number of units that may stay."""
        ...

    def check(self, keep: int) -> None:
        """Raise JobError unless a solution may keep that many units."""
        ...

    def scores(self, w: Tensor) -> Tensor:
        """Magnitude of every unit, (count,); the largest stay."""
        ...

    def project(self, w: Tensor, keep: int) -> Tensor:
        """Mask (g, o, d), bool, of the nearest point to `w` that keeps `keep` units."""
        ...

    def prox(self, w: Tensor, strength: float) -> Tensor:
        """Shrink `w`: the minimiser of `||v - w||^2 / 2 + strength * R(v)`."""
        ...


@dataclass(frozen=True, eq=False)
class Element:
    """Single weights; all rows of all groups compete in one pool, as in the code of [1]_.

    Parameters
    ----------
    free : BoolTensor (d,)
        Columns whose weights may go.
    rows : int
        Rows of the matrix in all groups together, g * o.

    References
    ----------
    .. [1] Bai et al., "Few Shot Network Compression via Cross Distillation", AAAI 2020. arXiv:1911.09450
    """

    free: Tensor
    rows: int

    @cached_property
    def count(self) -> int:
        """Number of weights that may go."""
        return self.rows * int(self.free.sum())

    @property
    def least(self) -> int:
        """One weight has to stay."""
        return 1

    def check(self, keep: int) -> None:
        """Raise JobError unless `keep` lies between one and all."""
        _check_range(keep, self.count, "weights")

    def scores(self, w: Tensor) -> Tensor:
        """Absolute value of every free weight, (count,), row by row."""
        return w[..., self.free.to(w.device)].abs().reshape(-1)

    def project(self, w: Tensor, keep: int) -> Tensor:
        """Mask of the `keep` weights of largest absolute value; of equals, the first."""
        return _scatter(_largest(self.scores(w), keep), self.free, w)

    def prox(self, w: Tensor, strength: float) -> Tensor:
        """Soft threshold, `sign(w) * max(|w| - strength, 0)`: the prox of the L1 norm."""
        return torch.where(self.free.to(w.device), _soft(w, strength), w)


@dataclass(frozen=True, eq=False)
class Channel:
    """Whole input channels: the columns of a unit vanish from all rows, and from all groups alike.

    Parameters
    ----------
    columns : LongTensor (d,)
        The unit that each column belongs to, 0 ... count - 1; -1 for columns that stay (bias, pinned
        channels). Units may differ in how many columns they hold.
    """

    columns: Tensor

    @cached_property
    def count(self) -> int:
        """Number of channels that may go."""
        return int(self.columns.max()) + 1 if self.columns.numel() else 0

    @property
    def least(self) -> int:
        """One channel has to stay."""
        return 1

    @cached_property
    def table(self) -> Tensor:
        """Columns of every unit in rising order, (count, widest unit), LongTensor; -1 fills the rows up."""
        members = self.columns.cpu()
        order = torch.argsort(members, stable=True)
        order = order[members[order] >= 0]
        sizes = torch.bincount(members[order], minlength=self.count)
        widest = int(sizes.max()) if self.count else 0
        table = torch.full((self.count, widest), -1, dtype=torch.long)
        table[torch.arange(widest) < sizes[:, None]] = order
        return table

    def check(self, keep: int) -> None:
        """Raise JobError unless `keep` lies between one and all."""
        _check_range(keep, self.count, "channels")

    def scores(self, w: Tensor) -> Tensor:
        """L2 norm of every channel over its columns, all rows and groups, (count,)."""
        # Gather instead of index_add, which is not deterministic on GPUs.
        squares = torch.cat([w.square().sum((0, 1)), w.new_zeros(1)])
        return squares[self.table.to(w.device)].sum(1).sqrt()

    def project(self, w: Tensor, keep: int) -> Tensor:
        """Mask of the `keep` channels of largest L2 norm; of equals, the first."""
        return self.spread(_largest(self.scores(w), keep), w)

    def spread(self, kept: Tensor, w: Tensor) -> Tensor:
        """Mask (g, o, d) that keeps the channels marked in `kept` (count,) and every column of no unit."""
        columns = self.columns.to(w.device)
        return (kept.to(w.device)[columns.clamp(min=0)] | (columns < 0)).expand(w.shape).contiguous()

    def prox(self, w: Tensor, strength: float) -> Tensor:
        """Group soft threshold, `max(1 - strength / norm, 0) * w`: the prox of the sum of L2 norms."""
        norms = self.scores(w)
        factor = torch.where(norms > strength, 1 - strength / norms.clamp(min=torch.finfo(w.dtype).tiny), 0.0)
        columns = self.columns.to(w.device)
        return w * torch.where(columns < 0, 1.0, factor[columns.clamp(min=0)])


@dataclass(frozen=True, eq=False)
class NofM:
    """Of every m consecutive input channels, n weights stay, for each row and kernel offset.

    A unit is a single weight. Solutions keep exactly `least` of them (the pattern) or all; in between, `project`
    keeps the n largest of each block and lets the others compete, so that solvers can approach it step by step.

    Parameters
    ----------
    n, m : int
        Blocks run along input channels at one kernel offset, which is what hardware wants; not along the order
        of a flattened weight. A last block of fewer than m channels keeps at most n as well.
    kernel_size : int
        Columns per input channel.
    free : BoolTensor (d,)
        Columns that the pattern governs; the others (the bias) are no part of any block.
    rows : int
        Rows of the matrix in all groups together, g * o.
    """

    n: int
    m: int
    kernel_size: int
    free: Tensor
    rows: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise JobError(f"{self.n}:{self.m} is no pattern.\n  n:m needs 1 <= n < m, as in 2:4.")

    @cached_property
    def count(self) -> int:
        """Number of weights that the pattern governs."""
        return self.rows * int(self.free.sum())

    @cached_property
    def least(self) -> int:
        """Number of weights that the pattern keeps."""
        members = self._blocks(self.free.cpu().to(torch.float64), 0.0)
        return self.rows * int(members.sum(-2).clamp(max=self.n).sum())

    def check(self, keep: int) -> None:
        """Raise JobError unless `keep` is what the pattern keeps, or all."""
        if keep not in (self.least, self.count):
            raise JobError(
                f"{self.n}:{self.m} keeps {self.least} of the {self.count} weights here, not {keep}.\n"
                f"  Pass keep={self.least}, or another structure."
            )

    def scores(self, w: Tensor) -> Tensor:
        """Absolute value of every free weight, (count,); infinite for the n largest of a block, which stay."""
        size = w.abs()
        blocks = self._blocks(torch.where(self.free.to(w.device), size, -1.0), -1.0)
        rank = torch.zeros_like(blocks, dtype=torch.long)
        for at in range(self.m):
            rival = blocks[..., at : at + 1, :]
            later = torch.arange(self.m, device=w.device)[:, None] > at
            rank += (rival > blocks) | ((rival == blocks) & later)
        wins = (rank < self.n).flatten(-3)[..., : w.shape[-1]]
        return torch.where(wins, torch.inf, size)[..., self.free.to(w.device)].reshape(-1)

    def project(self, w: Tensor, keep: int) -> Tensor:
        """Mask of the n largest weights of each block and, up to `keep`, of the largest others."""
        assert keep >= self.least, f"{self.n}:{self.m} cannot keep {keep} < {self.least}"
        return _scatter(_largest(self.scores(w), keep), self.free, w)

    def prox(self, w: Tensor, strength: float) -> Tensor:
        """Soft threshold of what the pattern drops: the prox of the sum of the m - n smallest of a block."""
        return torch.where(self.project(w, self.least), w, _soft(w, strength))

    def _blocks(self, values: Tensor, fill: float) -> Tensor:
        """Arrange columns (..., d) as (..., blocks, m, kernel offsets), padded with `fill`."""
        width = self.m * self.kernel_size
        missing = -values.shape[-1] % width
        padded = torch.nn.functional.pad(values, (0, missing), value=fill)
        return padded.reshape(*values.shape[:-1], -1, self.m, self.kernel_size)


def units(columns: Tensor, ids: np.ndarray) -> Tensor:
    """Return the position in `ids` of each column's label, -1 where it is not among them."""
    wanted = torch.as_tensor(ids, dtype=torch.long)
    most = max(int(columns.max()) if columns.numel() else 0, int(wanted.max()) if len(wanted) else 0)
    place = torch.full((most + 2,), -1)  # the last one is that of -1
    place[wanted] = torch.arange(len(wanted))
    return place.to(columns.device)[columns]


def _check_range(keep: int, count: int, what: str) -> None:
    if not 1 <= keep <= count:
        raise JobError(f"cannot keep {keep} of {count} {what}.\n  Keep at least 1 and at most {count}.")


def _largest(scores: Tensor, keep: int) -> Tensor:
    """Mark the `keep` largest of (count,) scores; of equals, the first ones."""
    count = scores.numel()
    if keep >= count:
        return torch.ones_like(scores, dtype=torch.bool)
    # topk breaks ties as it likes, and sorting millions of weights in every step of a ramp is slow.
    bar = scores.kthvalue(count - keep + 1).values
    above, ties = scores > bar, scores == bar
    return above | (ties & (ties.cumsum(0) <= keep - above.sum()))


def _scatter(kept: Tensor, free: Tensor, w: Tensor) -> Tensor:
    """Mask of shape (g, o, d) from marks of the free weights, row by row."""
    mask = torch.ones_like(w, dtype=torch.bool)
    mask[..., free.to(w.device)] = kept.reshape(*w.shape[:-1], -1)
    return mask


def _soft(w: Tensor, strength: float) -> Tensor:
    return w.sign() * (w.abs() - strength).clamp(min=0)
