"""Other views of a few samples: flips, shifts and mixtures.

Teacher and student are compared on whatever they are both shown, so a view need not be a likely image: it only has to
excite the network otherwise than the sample did. With ten samples this is worth more than any choice of solver. Every
pixel of a view is a pixel of the sample: interpolation would blur, and a blurred image excites other channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

# Of the height and width: how far a view is moved at most.
SHIFT = 0.125
# Rows to which a few samples are brought by views of them; with more samples views bring little.
VIEWS = 128
# Share of a batch that is blended with another sample of it, and share of the images that then get a piece of one.
BLENDED = 0.5
PIECED = 0.5


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
    """Return every image flipped with even odds and shifted by whole pixels, each by its own draw.

    What a shift uncovers shows the mirror image of what is next to it.

    Parameters
    ----------
    x : (n, ...)
    axes
        From :func:`image_axes`.
    generator : torch.Generator
        On the CPU, whatever the device of `x`: so every device draws the same views.
    """
    n = len(x)
    flipped = torch.rand(n, generator=generator) < 0.5
    first = x.movedim(axes, (1, 2))
    high, wide = first.shape[1:3]
    rows = _shifted(n, high, generator)
    columns = _shifted(n, wide, generator)
    columns = torch.where(flipped[:, None], wide - 1 - columns, columns)
    each = torch.arange(n)[:, None, None]
    index = (each.to(x.device), rows[:, :, None].to(x.device), columns[:, None, :].to(x.device))
    return first[index].movedim((1, 2), axes).contiguous()


def _shifted(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Return for each of `n` images which of `size` lines to show where, (n, size)."""
    most = round(SHIFT * size)
    by = torch.randint(-most, most + 1, (n, 1), generator=generator)
    seen = torch.arange(size) + by
    seen = seen.abs()
    return torch.where(seen >= size, 2 * (size - 1) - seen, seen)


def mixed(
    inputs: Mapping[str, Tensor], generator: torch.Generator, axes: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Return half of the batch blended with another sample of it, and half of the images with a piece of another.

    Blends ("mixup") add the other sample in a random ratio; integers cannot be blended, so where any input holds them
    none is. Pieces ("CutMix") are rectangles of random area at a random place.

    Parameters
    ----------
    inputs : {graph input: (n, ...)}
        All inputs of a sample are mixed with those of the same other sample.
    generator : torch.Generator
        On the CPU.
    axes : tuple of int, optional
        Height and width where the one input holds images; no pieces are pasted otherwise.

    References
    ----------
    .. [1] Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018. arXiv:1710.09412
    .. [2] Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers", ICCV 2019. arXiv:1905.04899
    """
    n = len(next(iter(inputs.values())))
    made = dict(inputs)
    if all(x.is_floating_point() for x in inputs.values()):
        other = torch.randperm(n, generator=generator)
        share = torch.rand(n, generator=generator)
        share[torch.rand(n, generator=generator) >= BLENDED] = 1.0
        for name, x in inputs.items():
            own = share.to(x).reshape(-1, *[1] * (x.ndim - 1))
            made[name] = own * x + (1 - own) * x[other.to(x.device)]
    if axes is not None:
        ((name, x),) = inputs.items()
        made[name] = _pasted(made[name], x, axes, generator)
    return made


def _pasted(onto: Tensor, pieces: Tensor, axes: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return `onto` with, on some of its images, a rectangle of another image of `pieces`."""
    n, high, wide = len(onto), onto.shape[axes[0]], onto.shape[axes[1]]
    other = torch.randperm(n, generator=generator)
    chosen = torch.rand(n, generator=generator) < PIECED
    # The area is uniform, so its root scales both sides.
    side = torch.rand(n, generator=generator).sqrt()
    inside = []
    for size in (high, wide):
        length = (side * size).round().clamp(min=1)
        start = (torch.rand(n, generator=generator) * (size - length + 1)).floor()
        line = torch.arange(size)
        inside.append((line >= start[:, None]) & (line < (start + length)[:, None]))
    where = inside[0][:, :, None] & inside[1][:, None, :] & chosen[:, None, None]
    shape = [n, *[1] * (onto.ndim - 1)]
    shape[axes[0]], shape[axes[1]] = high, wide
    return torch.where(where.reshape(shape).to(onto.device), pieces[other.to(onto.device)], onto)


def widened(
    inputs: Mapping[str, np.ndarray], total: int, generator: torch.Generator, folds: int = 1
) -> dict[str, np.ndarray]:
    """Return the samples followed by views of them, about `total` rows or all samples and their mirror images.

    Parameters
    ----------
    inputs : {graph input: (n, ...)}
        Views are made of a single image input; anything else comes back as it is.
    total : int
        Rows wanted. No views are made where the samples alone are half as many.
    generator : torch.Generator
    folds : int, default=1
        Samples are mixed only with those whose index leaves the same rest: so parts of the samples stay apart.

    Returns
    -------
    dict
        Row `r` is a view of sample `r % n`, from row `2 n` on mixed with others of its fold.
    """
    (name, array), *others = inputs.items()
    axes = image_axes(array.shape)
    n = len(array)
    if others or axes is None or 2 * n >= total:
        return dict(inputs)
    parts = [array, np.flip(array, axes[1])]
    x = torch.tensor(array)
    for _ in range(round(total / n) - 2):
        view = moved(x, axes, generator)
        for fold in range(min(folds, n)):
            view[fold::folds] = mixed({name: view[fold::folds]}, generator, axes)[name]
        parts.append(view.numpy())
    return {name: np.concatenate(parts)}
