"""What a layer's inputs come down to: three matrices, whatever the number of shots.

Legend of dimensions, used in the whole math half:

==  ==========================================================================================
n   shots
p   output positions of one shot
g   groups of the layer
o   outputs per group
d   columns per group: input channels of the group x kernel offsets; then the bias, if present
==  ==========================================================================================

A layer is `matrix (g, o, d) @ columns (g, d, n * p)`. `unroll` makes the columns, `to_matrix` the matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from xdonnx.errors import ShotsError

OPS = ("conv", "conv_transpose", "linear")


@dataclass(frozen=True)
class Geometry:
    """How a layer reads its input.

    Parameters
    ----------
    op : {'conv', 'conv_transpose', 'linear'}
        'linear' contracts the last axis of an input of shape (..., c); it has no kernel.
    groups : int
        Groups of channels that do not see each other.
    kernel, strides, dilations : tuple of int
        One number per spatial axis, of which there may be any number.
    pads : tuple of int
        All begins, then all ends: the order of ONNX.
    output_padding : tuple of int
        Of a transposed convolution; empty means none.
    """

    op: str
    groups: int = 1
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        rank = len(self.kernel)
        assert self.op in OPS, f"op {self.op!r} is none of {OPS}"
        assert (rank == 0) == (self.op == "linear"), f"kernel {self.kernel} does not fit op {self.op!r}"
        assert len(self.strides) == len(self.dilations) == rank, f"{self} needs {rank} strides and dilations"
        assert len(self.pads) == 2 * rank, f"{self} needs {2 * rank} pads"
        assert len(self.output_padding) in (0, rank), f"{self} needs {rank} output paddings, or none"


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

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        share = self.count / count

        def merge(mine: Tensor, theirs: Tensor) -> Tensor:
            return mine * share + theirs * (1 - share)

        tt = merge(self.tt, other.tt)
        if self.tt is self.ss and other.tt is other.ss:
            return Moments(tt, tt, tt, count)
        return Moments(tt, merge(self.ts, other.ts), merge(self.ss, other.ss), count)


def unroll(x: Tensor, geometry: Geometry) -> Tensor:
    """Columns of a layer's input: the layer becomes a product of matrices.

    Parameters
    ----------
    x : (n, c, ...) or, for 'linear', (..., c)
        The layer's input.
    geometry
        How the layer reads it.

    Returns
    -------
    Tensor (g, d, n * p)
        Without the bias. Rows run over (input channel of the group, kernel offset), as in a flattened weight.

    Notes
    -----
    A transposed convolution is the convolution of its input, stuffed with `stride - 1` zeros between neighbours,
    with the mirrored kernel (`to_matrix` mirrors it), so it has the same moments as any other layer.
    """
    groups = geometry.groups
    if geometry.op == "linear":
        return x.reshape(-1, groups, x.shape[-1] // groups).permute(1, 2, 0)
    padded, strides = _padded(x, geometry)
    sizes = _positions(padded.shape[2:], geometry, strides)
    n, c = x.shape[:2]
    columns = x.new_empty((groups, c // groups, prod(geometry.kernel), n, *sizes))
    for index, offset in enumerate(product(*map(range, geometry.kernel))):
        window = tuple(
            slice(at * dilation, at * dilation + (size - 1) * stride + 1, stride)
            for at, dilation, size, stride in zip(offset, geometry.dilations, sizes, strides, strict=True)
        )
        seen = padded[(slice(None), slice(None), *window)]
        columns[:, :, index] = seen.reshape(n, groups, c // groups, *sizes).movedim(0, 2)
    return columns.reshape(groups, c // groups * prod(geometry.kernel), n * prod(sizes))


def to_matrix(weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Matrix of a layer's weight: the one that multiplies `unroll`'s columns.

    Parameters
    ----------
    weight
        As ONNX stores it: (g * o, c / g, *kernel); for 'conv_transpose' (c, o, *kernel); for 'linear' (o, c).
    bias : (g * o,) or None
        Becomes the last column.

    Returns
    -------
    Tensor (g, o, d)
    """
    groups = geometry.groups
    if geometry.op == "conv_transpose":
        per_group = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).transpose(1, 2)
        matrix = _mirrored(per_group, geometry).flatten(3).flatten(2)
    else:
        matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    if bias is None:
        return matrix
    return torch.cat([matrix, bias.reshape(*matrix.shape[:2], 1).to(matrix)], dim=2)


def from_matrix(
    matrix: Tensor, geometry: Geometry, with_bias: bool, weight_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    """Undo `to_matrix`: the weight in ONNX's layout, and the bias if the matrix holds one.

    Parameters
    ----------
    matrix : (g, o, d)
    with_bias
        Whether the last column is the bias.
    weight_shape
        As ONNX stores the weight.

    Returns
    -------
    weight : Tensor of shape `weight_shape`
    bias : Tensor (g * o,) or None
    """
    bias = matrix[:, :, -1].reshape(-1).contiguous() if with_bias else None
    flat = matrix[:, :, :-1] if with_bias else matrix
    if geometry.op == "conv_transpose":
        groups, outputs = matrix.shape[:2]
        per_group = flat.reshape(groups, outputs, weight_shape[0] // groups, *geometry.kernel)
        flat = _mirrored(per_group, geometry).transpose(1, 2)
    return flat.reshape(weight_shape).contiguous(), bias


def measure(
    teacher: Iterable[Tensor],
    student: Iterable[Tensor],
    geometry: Geometry,
    *,
    bias: bool,
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
    shared: _Sum | None = None
    apart: tuple[_Sum, _Sum, _Sum] | None = None
    count = 0
    for chunk_t, chunk_s in zip(teacher, student, strict=True):
        assert chunk_t.shape == chunk_s.shape, f"teacher {chunk_t.shape}, student {chunk_s.shape}"
        if chunk_t is chunk_s:
            shared = shared or _Sum()
            for x in _columns(chunk_t, geometry, bias, columns_at_once, dtype):
                shared.add_gram(x)
                count += x.shape[2]
            continue
        apart = apart or (_Sum(), _Sum(), _Sum())
        both = (_columns(chunk, geometry, bias, columns_at_once, dtype) for chunk in (chunk_t, chunk_s))
        for x_t, x_s in zip(*both, strict=True):
            apart[0].add_gram(x_t)
            apart[1].add(x_t @ x_s.mT)
            apart[2].add_gram(x_s)
            count += x_t.shape[2]
    if count == 0:
        raise ShotsError("no shot reached the layer: there is nothing to measure.\n  Pass at least one sample.")
    if apart is None:
        assert shared is not None
        mean = shared.mean(count)
        return Moments(mean, mean, mean, count)
    totals = [part.mean(count) for part in apart]
    if shared is not None:
        mean = shared.mean(count)
        totals = [total + mean for total in totals]
    return Moments(totals[0], totals[1], totals[2], count)


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
    beside: tuple[Iterable[Tensor], Iterable[Tensor]],
    geometry: Geometry,
    *,
    bias: bool,
    columns_at_once: int = 8192,
) -> Missing | None:
    """Products of a layer's inputs with what another branch, which its output is added to, lacks in the student.

    Parameters
    ----------
    teacher, student
        Inputs of the layer in the two networks, in chunks.
    beside : (teacher, student)
        The other branch in the two networks, s_T and s_S, chunk by chunk of the output's shape.
    bias
        Append a row of ones to the inputs.

    Returns
    -------
    Missing or None
        None where the other branch is the same in both networks.
    """
    beside = (list(beside[0]), list(beside[1]))
    if all(a is b for a, b in zip(*beside, strict=True)):
        return None
    sums = (_Sum(), _Sum(), _Sum())
    count = 0
    for chunk_t, chunk_s, whole, found in zip(teacher, student, *beside, strict=True):
        seen = [_columns(chunk, geometry, bias, columns_at_once, torch.float64) for chunk in (chunk_t, chunk_s)]
        lacking = whole - found
        if geometry.op == "linear":
            flat = lacking.reshape(-1, lacking.shape[-1]).T
        else:
            flat = lacking.movedim(1, 0).reshape(lacking.shape[1], -1)
        grouped = flat.reshape(geometry.groups, -1, flat.shape[1]).double()
        sums[2].add(grouped.square().sum((1, 2)))
        at = 0
        for x_t, x_s in zip(*seen, strict=True):
            part = grouped[:, :, at : at + x_t.shape[2]]
            sums[0].add(part @ x_t.mT)
            sums[1].add(part @ x_s.mT)
            at += x_t.shape[2]
        count += at
    return Missing(*(total.mean(count) for total in sums))


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

    def add_gram(self, x: Tensor, block: int = 512) -> None:
        """Add `x @ x'`, of which only the blocks on and above the diagonal are computed."""
        g, d, _ = x.shape
        if self._total is None:
            self._total = x.new_zeros((g, d, d), dtype=torch.float64)
            self._upper_only = True
        for at in range(0, d, block):
            self._total[:, at : at + block, at:] += x[:, at : at + block] @ x[:, at:].mT

    def mean(self, count: int) -> Tensor:
        """Sum over `count`; a sum of Grams comes out exactly symmetric."""
        assert self._total is not None
        mean = self._total / count
        return mean.triu() + mean.triu(1).mT if self._upper_only else mean


def _columns(chunk: Tensor, geometry: Geometry, bias: bool, at_once: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Unroll a chunk a few shots at a time, with the row of ones."""
    if geometry.op == "linear":
        chunk = chunk.reshape(-1, chunk.shape[-1])
        positions = 1
    elif chunk.shape[0]:
        padded, strides = _padded(chunk[:1], geometry)
        positions = prod(_positions(padded.shape[2:], geometry, strides))
    else:
        return
    step = max(1, at_once // max(1, positions))
    for start in range(0, chunk.shape[0], step):
        part = unroll(chunk[start : start + step], geometry)
        columns = part.new_ones((part.shape[0], part.shape[1] + bias, part.shape[2]), dtype=dtype)
        columns[:, : part.shape[1]] = part
        yield columns


def _padded(x: Tensor, geometry: Geometry) -> tuple[Tensor, tuple[int, ...]]:
    """Input as a plain convolution without pads would read it, and that convolution's strides."""
    rank = len(geometry.kernel)
    begins, ends = geometry.pads[:rank], geometry.pads[rank:]
    strides = geometry.strides
    if geometry.op == "conv_transpose":
        reach = [dilation * (k - 1) for dilation, k in zip(geometry.dilations, geometry.kernel, strict=True)]
        extra = geometry.output_padding or (0,) * rank
        begins = tuple(r - pad for r, pad in zip(reach, begins, strict=True))
        ends = tuple(r - pad + e for r, pad, e in zip(reach, ends, extra, strict=True))
        x = _stuffed(x, strides)
        strides = (1,) * rank
    pads = [pad for pair in zip(reversed(begins), reversed(ends), strict=True) for pad in pair]
    # A negative pad crops: pads of a transposed convolution may exceed the kernel's reach.
    return (functional.pad(x, pads) if any(pads) else x), strides


def _stuffed(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Put `stride - 1` zeros between neighbours of every spatial axis."""
    if all(stride == 1 for stride in strides):
        return x
    sizes = [(size - 1) * stride + 1 for size, stride in zip(x.shape[2:], strides, strict=True)]
    stuffed = x.new_zeros((*x.shape[:2], *sizes))
    stuffed[(slice(None), slice(None), *(slice(None, None, stride) for stride in strides))] = x
    return stuffed


def _positions(padded: torch.Size, geometry: Geometry, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Output size of every spatial axis."""
    return tuple(
        max(0, (size - dilation * (k - 1) - 1) // stride + 1)
        for size, dilation, k, stride in zip(padded, geometry.dilations, geometry.kernel, strides, strict=True)
    )


def _mirrored(per_group: Tensor, geometry: Geometry) -> Tensor:
    """Flip every kernel axis."""
    return per_group.flip(tuple(range(-len(geometry.kernel), 0)))
