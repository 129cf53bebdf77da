"""Weights as products of thinner ones: the best pair of factors, and Tucker's three.

A weight is here (g, o, i, k...): groups, outputs and inputs of each, and the kernel, which a matrix lacks. Each group
is taken apart by itself, at the same rank. A piece has the same form, its kernel 1 along the axes that it leaves to
others, so that pieces in a row make one weight again: see `composed`.

References
----------
.. [1] Jaderberg, Vedaldi, Zisserman, "Speeding up Convolutional Neural Networks with Low Rank Expansions", BMVC 2014.
   arXiv:1405.3866
.. [2] Tai, Xiao, Zhang, Wang, E, "Convolutional Neural Networks with Low-rank Regularization", ICLR 2016.
   arXiv:1511.06067
.. [3] Kim, Park, Yoo, Choi, Yang, Shin, "Compression of Deep Convolutional Neural Networks for Fast and Low Power
   Mobile Applications", ICLR 2016. arXiv:1511.06530
.. [4] De Lathauwer, De Moor, Vandewalle, "On the Best Rank-1 and Rank-(R1, R2, ..., RN) Approximation of Higher-Order
   Tensors", SIAM J. Matrix Anal. Appl. 21(4), 2000.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Rounds of alternating least squares after the first guess; by then the error falls in the fourth digit.
SWEEPS = 4


def pair_ranks(shape: Sequence[int]) -> int:
    """Return the rank at which a pair of factors holds any weight of this shape."""
    _, outputs, inputs, *kernel = shape
    return min(inputs * int(np.prod(kernel[:1])), outputs * int(np.prod(kernel[1:])))


def pair_kept(weight: NDArray[Any]) -> Array:
    """Return the share of a weight's energy that the best pair of factors keeps, for rank 1, 2, ...

    Energy is the sum of squares, and what rank r loses of it are the squares of all singular values but the first r
    (Eckart & Young, 1936).
    """
    matrix = _as_matrix(weight)
    spectrum = np.linalg.eigvalsh(_smaller_gram(matrix))[:, ::-1].clip(min=0.0)
    return _share(np.cumsum(spectrum.sum(axis=0)))


def pair_pieces(weight: NDArray[Any], rank: int) -> tuple[Array, Array]:
    """Return the two pieces of a rank that differ least from a weight: a column of the kernel, then the rest of it.

    The first spans axis 0 of the kernel and makes `rank` channels, the second spans the other axes [1]_, [2]_. For a
    matrix and for a kernel of 1 this is the truncated singular value decomposition. Both pieces get the root of each
    singular value.

    Parameters
    ----------
    weight : (g, o, i, k...)
    rank : int
        Of each group.

    Returns
    -------
    (g, rank, i, k0, 1...) and (g, o, rank, 1, k1...)
    """
    groups, outputs, inputs, *kernel = weight.shape
    matrix = _as_matrix(weight)
    # Projections on the leading eigenvectors of the smaller Gram matrix: a fraction of the time of a whole
    # decomposition, and exact at full rank, whatever the digits lost to the square.
    leading = _leading(_smaller_gram(matrix), rank)
    if matrix.shape[1] <= matrix.shape[2]:
        left, right = leading, np.matmul(_turned(leading), matrix)
        values = np.linalg.norm(right, axis=2)
        root = np.sqrt(np.where(values > 0, values, 1.0))
        left, right = left * root[:, None, :], right / root[:, :, None]
    else:
        left, right = np.matmul(matrix, leading), _turned(leading)
        values = np.linalg.norm(left, axis=1)
        root = np.sqrt(np.where(values > 0, values, 1.0))
        left, right = left / root[:, None, :], right * root[:, :, None]
    first = _turned(left).reshape(groups, rank, inputs, *kernel[:1], *[1] * len(kernel[1:]))
    last = np.moveaxis(right.reshape(groups, rank, outputs, *[1] * len(kernel[:1]), *kernel[1:]), 1, 2)
    return np.ascontiguousarray(first), np.ascontiguousarray(last)


def channel_kept(weight: NDArray[Any]) -> Array:
    """Return the share of a weight's energy that a core of ranks (out, in) keeps, before any sweep; (o, i).

    The higher-order singular value decomposition turns the channels so that the core holds all energy, most of it in
    front; sweeps only add to what a corner of it keeps.
    """
    incoming, outgoing = (_leading(_gram(weight, axis), weight.shape[axis]) for axis in (2, 1))
    energy: Array = np.square(_onto(_onto(weight, incoming, 2), outgoing, 1))
    corner = energy.sum(axis=(0, *range(3, energy.ndim)))
    return _share(np.cumsum(np.cumsum(corner, axis=0), axis=1))


def channel_pieces(weight: NDArray[Any], rank_in: int, rank_out: int, *, sweeps: int = SWEEPS) -> tuple[Array, ...]:
    """Return Tucker's pieces of a weight: fewer channels in, the kernel between few channels, all channels out [3]_.

    The first guess is that of `channel_kept`; each sweep then gives one side the best it can have with the other held
    [4]_.

    Parameters
    ----------
    weight : (g, o, i, k...)
    rank_in, rank_out : int
        Of each group. A side of full rank gets no piece of its own.
    sweeps : int

    Returns
    -------
    (g, rank_in, i, 1...), (g, rank_out, rank_in, k...) and (g, o, rank_out, 1...)
        The first and the last only where they make channels fewer.
    """
    _, outputs, inputs, *kernel = weight.shape
    incoming, outgoing = _leading(_gram(weight, 2), rank_in), _leading(_gram(weight, 1), rank_out)
    for _ in range(sweeps if rank_in < inputs and rank_out < outputs else 0):
        incoming = _leading(_gram(_onto(weight, outgoing, 1), 2), rank_in)
        outgoing = _leading(_gram(_onto(weight, incoming, 2), 1), rank_out)
    core, ones = np.asarray(weight, np.float64), [1] * len(kernel)
    pieces: list[Array] = []
    if rank_in < inputs:
        core = _onto(core, incoming, 2)
        pieces.append(_turned(incoming).reshape(*incoming.shape[:1], rank_in, inputs, *ones))
    if rank_out < outputs:
        core = _onto(core, outgoing, 1)
    pieces.append(core)
    if rank_out < outputs:
        pieces.append(outgoing.reshape(*outgoing.shape, *ones))
    return tuple(np.ascontiguousarray(piece) for piece in pieces)


def composed(pieces: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return the one weight that pieces in a row come to, the first of them first."""
    # Kernels are 1 where another piece spans the axis, so that they broadcast.
    return reduce(lambda first, then: np.einsum("gri...,gor...->goi...", first, then, optimize=True), pieces)


def _as_matrix(weight: NDArray[Any]) -> Array:
    """Return (g, i k0, o k1...)."""
    groups, _, inputs, *kernel = weight.shape
    order = (0, 2, *([3] if kernel else []), 1, *range(4, weight.ndim))
    rows = inputs * int(np.prod(kernel[:1]))
    return weight.astype(np.float64).transpose(order).reshape(groups, rows, -1)


def _smaller_gram(matrix: Array) -> Array:
    wide = matrix.shape[1] <= matrix.shape[2]
    gram: Array = np.matmul(matrix, _turned(matrix)) if wide else np.matmul(_turned(matrix), matrix)
    return gram


def _gram(weight: NDArray[Any], axis: int) -> Array:
    """Return (g, n, n): the products of a weight's slices along an axis."""
    rows = np.moveaxis(weight.astype(np.float64), axis, 1).reshape(weight.shape[0], weight.shape[axis], -1)
    gram: Array = np.matmul(rows, _turned(rows))
    return gram


def _leading(gram: Array, count: int) -> Array:
    """Return the eigenvectors of the largest eigenvalues, (g, n, count)."""
    vectors: Array = np.linalg.eigh(gram)[1][:, :, ::-1]
    return vectors[:, :, :count]


def _onto(weight: NDArray[Any], basis: Array, axis: int) -> Array:
    """Return a weight in the coordinates of a basis (g, n, r) of one axis."""
    turned = np.matmul(_turned(basis), np.moveaxis(weight, axis, 1).reshape(*basis.shape[:2], -1))
    shape = [size for at, size in enumerate(weight.shape) if at not in (0, axis)]
    moved: Array = np.moveaxis(turned.reshape(basis.shape[0], basis.shape[2], *shape), 1, axis)
    return moved


def _turned(matrices: Array) -> Array:
    return np.swapaxes(matrices, 1, 2)


def _share(kept: Array) -> Array:
    """Return energies as shares of the last, which is all there is; a weight of zeros is kept at any rank."""
    whole = kept.flat[-1]
    return np.minimum(kept / whole, 1.0) if whole > 0 else np.ones_like(kept)
