"""A layer as a product of matrices: its input unrolled to columns, its weight to a matrix.

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

from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

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


def columns(
    x: Tensor,
    geometry: Geometry,
    places: Tensor | None = None,
    *,
    bias: bool,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Unroll a layer's input, at some positions only, with a row of ones where the bias is a column.

    Parameters
    ----------
    x : (n, c, ...) or, for 'linear', (n, ..., c)
    geometry
        How the layer reads it.
    places : LongTensor (n, q), optional
        The positions of each shot that are looked at, from :func:`spread`; None means all.
    bias
        Append a row of ones.

    Returns
    -------
    Tensor (g, d, positions)
    """
    if places is None:
        seen = unroll(x, geometry)
        rows, positions = seen.shape[1:]
    else:
        seen = _unrolled_at(x, geometry, places)
        rows, positions = prod(seen.shape[1:3]), places.numel()
    made = x.new_empty((len(seen), rows + bias, positions), dtype=dtype)
    # One copy changes order and precision at once.
    made[:, :rows].view(seen.shape).copy_(seen)
    made[:, rows:] = 1
    return made


def among(matrices: Tensor, places: Tensor) -> Tensor:
    """Return the entries that matrices (g, d, d) have in some rows and the same columns, (g, k, k)."""
    # Twice index_select takes three times as long: it walks the second axis entry by entry.
    return matrices.index_select(1, places).gather(2, places.expand(len(matrices), len(places), -1))


def spread(sizes: tuple[int, ...], shots: int, each: int, first: int = 0) -> Tensor:
    """Return positions that lie evenly over a grid, others for every shot.

    Parameters
    ----------
    sizes : tuple of int
        Of the grid.
    shots, each : int
        Positions wanted: `each` for every one of `shots`.
    first : int
        Number of the first shot: chunks of one sequence go on where the last one ended.

    Returns
    -------
    LongTensor (shots, each)
        Indices into the flattened grid; a position may come twice.

    Notes
    -----
    The additive recurrence with the generalised golden ratio, whose points keep their distance in any number of
    dimensions. Neighbours in an image say nearly the same, so points that are far apart say more than random ones, and
    no grid of even steps can fall in line with the strides of the network.

    References
    ----------
    .. [1] Martin Roberts, "The Unreasonable Effectiveness of Quasirandom Sequences", 2018.
    """
    rank, ratio = len(sizes), 2.0
    for _ in range(64 if rank else 0):
        ratio = (1 + ratio) ** (1 / (rank + 1))
    point = torch.arange(first * each, (first + shots) * each, dtype=torch.float64) + 1
    flat = torch.zeros(len(point), dtype=torch.long)
    for axis, size in enumerate(sizes):
        share = (0.5 + point * ratio ** -(axis + 1)) % 1
        flat = flat * size + (share * size).long().clamp(max=size - 1)
    return flat.reshape(shots, each)


def grid(chunk: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """Return the sizes of a layer's grid of output positions."""
    if geometry.op == "linear":
        return tuple(chunk.shape[1:-1])
    padded, strides = _padded(chunk[:1], geometry)
    return _positions(padded.shape[2:], geometry, strides)


def _unrolled_at(x: Tensor, geometry: Geometry, places: Tensor) -> Tensor:
    """Unroll at some positions only: (g, c / g, kernel offsets, n, q), a view."""
    n, each = places.shape
    groups = geometry.groups
    if geometry.op == "linear":
        flat = x.reshape(n, -1, x.shape[-1])
        seen = flat.gather(1, places[:, :, None].expand(-1, -1, flat.shape[2]))
        return seen.reshape(n, each, groups, -1).permute(2, 3, 0, 1)[:, :, None]
    sizes, begins, strides = grid(x, geometry), geometry.pads[: len(geometry.kernel)], geometry.strides
    if geometry.op == "conv_transpose":
        x, strides = _padded(x, geometry)
        begins = (0,) * len(begins)
    spots, rest = list[Tensor](), places
    for size in reversed(sizes):
        spots.insert(0, rest % size)
        rest = rest // size
    # The whole input is not copied for the sake of a pad around it: what lies in the pad is set to zero afterwards.
    index, inside = torch.zeros_like(places)[:, None], torch.ones_like(places, dtype=torch.bool)[:, None]
    for axis, (spot, begin, stride) in enumerate(zip(spots, begins, strides, strict=True)):
        reach = torch.arange(geometry.kernel[axis], device=x.device) * geometry.dilations[axis] - begin
        at, size = (spot * stride)[:, None] + reach[:, None], x.shape[axis + 2]
        inside = (inside[:, :, None] & ((at >= 0) & (at < size))[:, None]).flatten(1, 2)
        index = (index[:, :, None] * size + at.clamp(0, size - 1)[:, None]).flatten(1, 2)
    index = index.flatten(1)[:, None]
    seen = x.flatten(2).gather(2, index.expand(-1, x.shape[1], -1))
    if not bool(inside.all()):
        seen *= inside.flatten(1)[:, None]
    return seen.reshape(n, groups, -1, prod(geometry.kernel), each).permute(1, 2, 3, 0, 4)


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
