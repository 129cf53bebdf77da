"""ONNX's Resize, axis by axis: every mode is a product with a small matrix, so it is exact and has gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def interpolate(
    x: Tensor,
    scales: Sequence[float] | None,
    sizes: Sequence[int] | None,
    *,
    mode: str,
    coordinates: str,
    nearest: str,
    cubic: float = -0.75,
    exclude_outside: bool = False,
) -> Tensor:
    """Resize a tensor as the operator Resize does.

    Parameters
    ----------
    x : Tensor, any rank
    scales, sizes
        One entry per axis; exactly one of the two.
    mode : {'nearest', 'linear', 'bilinear', 'cubic'}
    coordinates : {'half_pixel', 'pytorch_half_pixel', 'align_corners', 'asymmetric'}
        How an output index maps to the input.
    nearest : {'round_prefer_floor', 'round_prefer_ceil', 'floor', 'ceil'}
    cubic : float
        The parameter a of the cubic kernel.
    exclude_outside : bool
        Whether cubic weights of pixels outside are dropped and the rest rescaled.
    """
    for axis in range(x.ndim):
        before = x.shape[axis]
        after = int(sizes[axis]) if sizes is not None else math.floor(before * (scales or ())[axis])
        scale = after / before if scales is None else scales[axis]
        if after == before and scale == 1:
            continue
        source = _source(after, before, scale, coordinates)
        if mode == "nearest":
            at = torch.tensor([_rounded(s, nearest) for s in source], device=x.device)
            x = x.index_select(axis, at.clamp(0, before - 1))
        else:
            rows = [
                _cubic_row(s, before, cubic, exclude_outside) if mode == "cubic" else _linear_row(s, before)
                for s in source
            ]
            matrix = torch.tensor(rows, dtype=x.dtype, device=x.device)
            x = torch.tensordot(x, matrix, dims=([axis], [1])).movedim(-1, axis)
    return x


def _source(after: int, before: int, scale: float, coordinates: str) -> list[float]:
    if coordinates == "align_corners":
        step = (before - 1) / (after - 1) if after > 1 else 0.0
        return [i * step for i in range(after)]
    if coordinates == "asymmetric":
        return [i / scale for i in range(after)]
    if coordinates == "pytorch_half_pixel" and after == 1:
        return [0.0]
    return [(i + 0.5) / scale - 0.5 for i in range(after)]


def _rounded(position: float, nearest: str) -> int:
    if nearest == "floor":
        return math.floor(position)
    if nearest == "ceil":
        return math.ceil(position)
    if nearest == "round_prefer_ceil":
        return math.floor(position + 0.5)
    return math.ceil(position - 0.5)


def _linear_row(position: float, size: int) -> list[float]:
    row = [0.0] * size
    low = math.floor(position)
    for at, weight in ((low, 1 - (position - low)), (low + 1, position - low)):
        row[min(max(at, 0), size - 1)] += weight
    return row


def _cubic_row(position: float, size: int, a: float, exclude_outside: bool) -> list[float]:
    row = [0.0] * size
    low = math.floor(position)
    for at in range(low - 1, low + 3):
        t = abs(position - at)
        near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
        weight = near if t <= 1 else far
        if exclude_outside and not 0 <= at < size:
            continue
        row[min(max(at, 0), size - 1)] += weight
    total = sum(row)
    return [weight / total for weight in row] if exclude_outside else row
