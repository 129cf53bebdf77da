"""Other views of a few samples: flips, shifts, zooms and mixtures.

Teacher and student are compared on whatever they are both shown, so a view need not be a likely image: it only has to
excite the network otherwise than the sample did. With ten samples this is worth more than any choice of solver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

# Of the height and width: how far a view is moved, and how much of the image it may leave out.
SHIFT = 0.25
ZOOM = 0.3
# Rows to which a few samples are brought by views of them; with more samples views bring little.
VIEWS = 128
# Share of a batch that is mixed with another sample of it.
MIXED = 0.5


def image_axes(shape: Sequence[object]) -> tuple[int, int] | None:
    """Return the axes of height and width of an input, None where it holds no images.

    Images have four axes and 1 or 3 channels, first or last.
    """
    if len(shape) != 4:
        return None
    if shape[1] in (1, 3):
        return 2, 3
    return (1, 2) if shape[3] in (1, 3) else None


def moved(x: Tensor, axes: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return every image flipped with even odds, shifted and zoomed in, each by its own draw.

    Parameters
    ----------
    x : (n, ...) floating
    axes
        From :func:`image_axes`.
    generator : torch.Generator
        On the CPU, whatever the device of `x`: so every device draws the same views.
    """
    n = len(x)
    sign = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    scale = 1 - ZOOM * torch.rand(n, generator=generator)
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = sign * scale, scale
    affine[:, :, 2] = (2 * torch.rand(n, 2, generator=generator) - 1) * SHIFT
    first = x.movedim(axes, (2, 3))
    grid = functional.affine_grid(affine.to(first), list(first.shape), align_corners=False)
    seen = functional.grid_sample(first, grid, padding_mode="reflection", align_corners=False)
    return seen.movedim((2, 3), axes).contiguous()


def mixed(inputs: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return half of the batch mixed with another sample of it in a random ratio (Zhang et al., "mixup", ICLR 2018).

    All inputs of a sample are mixed with those of the same other sample. Integers cannot be mixed: where any input
    holds them the batch stays as it is.
    """
    if not all(x.is_floating_point() for x in inputs.values()):
        return dict(inputs)
    n = len(next(iter(inputs.values())))
    other = torch.randperm(n, generator=generator)
    share = torch.rand(n, generator=generator)
    share[torch.rand(n, generator=generator) >= MIXED] = 1.0
    made = {}
    for name, x in inputs.items():
        own = share.to(x).reshape(-1, *[1] * (x.ndim - 1))
        made[name] = own * x + (1 - own) * x[other.to(x.device)]
    return made


def widened(inputs: Mapping[str, np.ndarray], total: int, generator: torch.Generator) -> dict[str, np.ndarray]:
    """Return the samples followed by views of them, about `total` rows or all samples and their mirror images.

    Parameters
    ----------
    inputs : {graph input: (n, ...)}
        Views are made of a single image input; anything else comes back as it is.
    total : int
        Rows wanted. No views are made where the samples alone are half as many.
    generator : torch.Generator

    Returns
    -------
    dict
        Row `r` is a view of sample `r % n`.
    """
    (name, array), *others = inputs.items()
    axes = image_axes(array.shape)
    if others or axes is None or array.dtype.kind != "f" or 2 * len(array) > total:
        return dict(inputs)
    parts = [array, np.flip(array, axes[1])]
    x = torch.tensor(array).float()
    for _ in range(round(total / len(array)) - 2):
        parts.append(moved(x, axes, generator).numpy().astype(array.dtype))
    return {name: np.concatenate(parts)}
