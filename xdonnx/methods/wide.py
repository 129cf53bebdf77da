"""Layers with more columns than moments can hold, fitted from the columns themselves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xdonnx.columns import Geometry, unroll
from xdonnx.shelf import Chunks

# Entries of the columns that are held at once.
MOST_ENTRIES = 1 << 26


def sampled_columns(chunks: Chunks, geometry: Geometry) -> Tensor:
    """Return the unrolled columns (g, d, positions) in float64, evenly thinned where they are too many."""
    parts = []
    for chunk in chunks:
        part = unroll(chunk, geometry)
        most = max(1, MOST_ENTRIES // (part.shape[1] * len(chunks)))
        stride = -(-part.shape[2] // most)
        parts.append(part[:, :, ::stride])
    return torch.cat(parts, 2).double()


class Fit(NamedTuple):
    """Weights (g, o, d), and the error before and after the fit as a share of the teacher's output energy."""

    weight: Tensor
    before: float
    after: float


def regressed(teacher: Tensor, x_t: Tensor, x_s: Tensor, alive: Tensor, ridge: float) -> Fit:
    """Fit the columns that stay by regression, from the columns themselves.

    Parameters
    ----------
    teacher : (g, o, d)
    x_t, x_s : (g, d, positions)
        The layer's unrolled inputs in the two networks.
    alive : BoolTensor (d,)
        Columns that stay.
    ridge : float
        Pull toward the teacher's weights, relative to the mean curvature.

    Notes
    -----
    With fewer positions than columns the ridge solution is `W_T + E (X'X + lambda I)^-1 X'`, where E is what the
    removal leaves undone (the Woodbury identity).
    """
    target = teacher @ x_t
    energy = target.square().sum().clamp(min=1e-30)
    seen = x_s[:, alive]
    undone = target - teacher[..., alive] @ seen
    gram = seen.mT @ seen
    pull = max(ridge, 1e-6) * gram.diagonal(dim1=1, dim2=2).mean(1) * gram.shape[-1] / max(int(alive.sum()), 1)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    step = torch.linalg.solve(gram + pull.reshape(-1, 1, 1) * eye, undone.mT).mT @ seen.mT
    made = teacher * alive
    made[..., alive] += step
    left = target - made @ x_s
    return Fit(made, float(undone.square().sum() / energy), float(left.square().sum() / energy))
